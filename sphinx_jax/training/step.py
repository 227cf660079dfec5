"""One training step and one evaluation step, as pure functions to be compiled for a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.conversation import IGNORE_INDEX
from sphinx_jax.kernels.argmax import argmax
from sphinx_jax.lora_params import join
from sphinx_jax.model import bind
from sphinx_jax.training.auxiliary_probe import probe_losses

Batch = dict[str, Array]
Params = dict[str, Any]
Metrics = dict[str, Array]

NOTHING: Params = {}


class TrainState(NamedTuple):
    """All that a step reads and replaces.

    `params` holds "model" and "attributes" (empty where not used); or, where adapters alone learn, "adapters" and
    "attributes", and the model is given to the step besides.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: Any


def next_tokens(
    logits: Float[Array, "batch text vocab"], labels: Int[Array, "batch text"]
) -> tuple[Float[Array, "batch text-1"], Bool[Array, "batch text-1"], Bool[Array, "batch text-1"]]:
    """For each position but the last: -log p(next label), whether greedy decoding would give it, whether it counts.

    `labels[i]` is the id of token i where it is to be learned, NOT_LEARNED elsewhere; position i predicts label i + 1.
    """
    # Shifted are the labels and what is found, not the scores: those are the largest array there is.
    targets = jnp.roll(labels, -1, axis=1)
    losses, likeliest = _cross_entropy(logits, targets), argmax(logits)
    return losses[:, :-1], (likeliest == targets)[:, :-1], (targets != IGNORE_INDEX)[:, :-1]


@jax.custom_vjp
def _cross_entropy(
    logits: Float[Array, "batch text vocab"], targets: Int[Array, "batch text"]
) -> Float[Array, "batch text"]:
    """-log softmax(logits) at the target. Its gradient is written out: autodiff's scatters into an array of zeros."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _cross_entropy_forward(logits, targets):
    return _cross_entropy(logits, targets), (logits, targets)


def _cross_entropy_backward(residuals, gradient):
    logits, targets = residuals
    wanted = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jax.nn.softmax(logits, axis=-1) - wanted) * gradient[..., None], None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def answers(
    right: Bool[Array, "batch text-1"], counted: Bool[Array, "batch text-1"]
) -> tuple[Bool[Array, "batch text"], Bool[Array, "batch text"]]:
    """For answer 1, 2, ... of each row (second axis): whether all its tokens are right, and whether it exists.

    An answer is a run of learned tokens. One all of whose tokens are the likeliest given the true ones before is
    what greedy decoding would write.
    """
    begins = counted & ~jnp.pad(counted[:, :-1], ((0, 0), (1, 0)))
    number = jnp.cumsum(begins, axis=1)
    rows = jnp.arange(counted.shape[0])[:, None]
    count = lambda flags: jnp.zeros((counted.shape[0], counted.shape[1] + 1), jnp.int32).at[rows, number].add(flags)
    exists = count(counted) > 0
    return exists & (count(counted & ~right) == 0), exists


def make_loss(
    graph: nnx.GraphDef,
    config: SphinxConfig,
    *,
    flags: Any = None,
    aux_loss_weight: float = 0.0,
    remat: str = "none",
    dtype: Any = None,
) -> Callable[[Params, Batch], tuple[Float[Array, ""], Metrics]]:
    """The training loss of a batch: next-word loss, balance loss, and the loss on attributes if it has a weight.

    The batch holds `tokens` and `labels` int[B, T]; where there are any, `segment_ids` int[B, T] and `images`
    float[B, S, S, 3]; and for the loss on attributes `shape` and `colour` int[B].
    `params` holds "model", "attributes", and "adapters" if there are any. `flags` says which of the model's parameters
    learn (None: all); no gradient is computed for the others.
    `dtype` is what the model computes in; parameters of another dtype are cast once.
    """

    def loss(params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        weights = join(params["model"], params.get("adapters", {}))
        if flags is not None:
            weights = jax.tree.map(
                lambda p, is_trainable: p if is_trainable else jax.lax.stop_gradient(p), weights, flags
            )
        if dtype is not None:
            weights = jax.tree.map(lambda p: p.astype(dtype), weights)
        logits, record = bind(graph, weights)(
            batch["tokens"], batch.get("images"), batch.get("segment_ids"), remat=remat
        )
        losses, right, counted = next_tokens(logits, batch["labels"])
        words = losses.sum(where=counted) / jnp.maximum(counted.sum(), 1)
        correct, asked = answers(right, counted)
        routing = record["layers"]["routing"]
        balance = routing.balance_loss.mean()
        metrics = {
            "loss": words,
            "balance_loss": balance,
            "accuracy": correct.sum() / jnp.maximum(asked.sum(), 1),
            "expert_share": routing.share.mean(axis=0),
        }
        total = words + config.balance_weight * balance
        if aux_loss_weight:
            extra, extra_metrics = probe_losses(params["attributes"], record["words"], batch)
            total, metrics = total + aux_loss_weight * extra, metrics | extra_metrics
        return total, metrics

    return loss


def make_train_step(
    loss: Callable[[Params, Batch], tuple[Float[Array, ""], Metrics]],
    optimizer: optax.GradientTransformation,
    shardings: Params,
    grad_accum_steps: int = 1,
) -> Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]:
    """state, batch, frozen -> next state, metrics. With `grad_accum_steps` > 1 the batch is worked through in so many parts.

    `frozen` are parameters that the loss needs beside those of the state, which alone are differentiated. Gradients
    are held to the `shardings` of the latter, so that with fsdp each device keeps only its part of them.
    """

    def step(state: TrainState, batch: Batch, frozen: Params = NOTHING) -> tuple[TrainState, Metrics]:
        gradient = jax.value_and_grad(lambda params, part: loss(params | frozen, part), has_aux=True)

        def one(part: Batch) -> tuple[Params, Metrics]:
            (_, metrics), grads = gradient(state.params, part)
            return jax.lax.with_sharding_constraint(grads, shardings), metrics

        if grad_accum_steps == 1:
            grads, metrics = one(batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(grad_accum_steps, -1, *x.shape[1:]), batch)
            add = lambda so_far, part: (jax.tree.map(jnp.add, so_far, one(part)), None)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts)))
            summed, _ = jax.lax.scan(add, zeros, parts)
            grads, metrics = jax.tree.map(lambda x: x / grad_accum_steps, summed)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_eval_step(
    graph: nnx.GraphDef, dtype: jnp.dtype
) -> Callable[[Params, Batch], tuple[Bool[Array, "batch text"], Bool[Array, "batch text"], Array]]:
    """model parameters, batch -> `answers` right and existing, and each layer's share of tokens by expert.

    The model computes in `dtype`.
    """

    def evaluate(params: Params, batch: Batch):
        weights = jax.tree.map(lambda p: p.astype(dtype), params)
        logits, record = bind(graph, weights)(batch["tokens"], batch.get("images"), batch.get("segment_ids"))
        _, right, counted = next_tokens(logits, batch["labels"])
        return *answers(right, counted), record["layers"]["routing"].share

    return evaluate
