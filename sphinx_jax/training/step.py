"""The train step and the evaluation step, as pure functions to be compiled for a mesh."""

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
from sphinx_jax.training.auxiliary_probe import aux_probe_loss

Batch = dict[str, Array]
Params = dict[str, Any]
Metrics = dict[str, Array]

NO_FROZEN_PARAMS: Params = {}


class TrainState(NamedTuple):
    """The donated argument of the train step.

    `params` holds "model" and "aux_probe" (empty where not used). With LoRA it holds "adapters" and "aux_probe", and
    the frozen model is a separate argument of the step.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any


def next_token_losses(
    logits: Float[Array, "batch text vocab"], labels: Int[Array, "batch text"]
) -> tuple[Float[Array, "batch text-1"], Bool[Array, "batch text-1"], Bool[Array, "batch text-1"]]:
    """For each position but the last: -log p(target), whether greedy decoding gives the target, and the loss mask.

    `labels[i]` is the id of token i, or IGNORE_INDEX where token i has no loss; position i predicts label i + 1.
    """
    # The labels and the results are shifted, not the logits: a copy of [batch, text, vocab] would double peak memory.
    targets = jnp.roll(labels, -1, axis=1)
    losses, predictions = _cross_entropy(logits, targets), argmax(logits)
    return losses[:, :-1], (predictions == targets)[:, :-1], (targets != IGNORE_INDEX)[:, :-1]


@jax.custom_vjp
def _cross_entropy(
    logits: Float[Array, "batch text vocab"], targets: Int[Array, "batch text"]
) -> Float[Array, "batch text"]:
    """-log softmax(logits) at the target.

    The gradient is explicit: autodiff would scatter into zeros [batch, text, vocab].
    """
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logits


def _cross_entropy_forward(logits, targets):
    return _cross_entropy(logits, targets), (logits, targets)


def _cross_entropy_backward(residuals, gradient):
    logits, targets = residuals
    # d loss / d logits = softmax(logits) - one_hot(target); the comparison fuses, so no one-hot array is stored.
    one_hot = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jax.nn.softmax(logits, axis=-1) - one_hot) * gradient[..., None], None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def answer_correctness(
    correct: Bool[Array, "batch text-1"], loss_mask: Bool[Array, "batch text-1"]
) -> tuple[Bool[Array, "batch text"], Bool[Array, "batch text"]]:
    """For answer 1, 2, ... of each sequence (second axis): whether all its tokens are correct, and whether it exists.

    An answer is a run of positions with a loss. It is correct if every token has the highest logit given the true
    tokens before it, that is if greedy decoding would generate it.
    """
    starts = loss_mask & ~jnp.pad(loss_mask[:, :-1], ((0, 0), (1, 0)))
    answer_index = jnp.cumsum(starts, axis=1)
    batch_index = jnp.arange(loss_mask.shape[0])[:, None]

    def count(flags: Bool[Array, "batch text-1"]) -> Int[Array, "batch text"]:
        """Positions of each answer where `flags` is set."""
        zeros = jnp.zeros((loss_mask.shape[0], loss_mask.shape[1] + 1), jnp.int32)
        return zeros.at[batch_index, answer_index].add(flags)

    exists = count(loss_mask) > 0
    return exists & (count(loss_mask & ~correct) == 0), exists


def make_loss(
    graph: nnx.GraphDef,
    config: SphinxConfig,
    *,
    trainable: Any = None,
    aux_loss_weight: float = 0.0,
    remat: str = "none",
    dtype: Any = None,
) -> Callable[[Params, Batch], tuple[Float[Array, ""], Metrics]]:
    """The training loss of a batch: next-token loss, load-balancing loss, and with a weight the auxiliary probe loss.

    The batch holds `tokens` and `labels` int[B, T]; optionally `segment_ids` int[B, T] and `images`
    float[B, S, S, 3]; and for the auxiliary probe loss `shape` and `colour` int[B].
    `params` holds "model", "aux_probe", and with LoRA "adapters". `trainable` is a mask of the model's parameters
    (None: all trainable); no gradient is computed for the others.
    `dtype` is the compute dtype; parameters of another dtype are cast once.
    """

    def loss(params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        weights = join(params["model"], params.get("adapters", {}))
        if trainable is not None:
            weights = jax.tree.map(lambda p, keep: p if keep else jax.lax.stop_gradient(p), weights, trainable)
        if dtype is not None:
            weights = jax.tree.map(lambda p: p.astype(dtype), weights)
        logits, intermediates = bind(graph, weights)(
            batch["tokens"], batch.get("images"), batch.get("segment_ids"), remat=remat
        )
        losses, correct, loss_mask = next_token_losses(logits, batch["labels"])
        token_loss = losses.sum(where=loss_mask) / jnp.maximum(loss_mask.sum(), 1)
        answer_correct, answer_exists = answer_correctness(correct, loss_mask)
        routing = intermediates["layers"]["routing"]
        balance = routing.balance_loss.mean()
        metrics = {
            "loss": token_loss,
            "balance_loss": balance,
            "accuracy": answer_correct.sum() / jnp.maximum(answer_exists.sum(), 1),
            "expert_share": routing.expert_load.mean(axis=0),
        }
        total = token_loss + config.balance_weight * balance
        if aux_loss_weight:
            aux_loss, aux_metrics = aux_probe_loss(params["aux_probe"], intermediates["image_embeds"], batch)
            total, metrics = total + aux_loss_weight * aux_loss, metrics | aux_metrics
        return total, metrics

    return loss


def make_train_step(
    loss: Callable[[Params, Batch], tuple[Float[Array, ""], Metrics]],
    optimizer: optax.GradientTransformation,
    shardings: Params,
    grad_accum_steps: int = 1,
) -> Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]:
    """state, batch, frozen params -> next state, metrics.

    `grad_accum_steps` > 1 splits the batch into so many microbatches and averages their gradients.
    `frozen_params` complete those of the state for the loss; only the latter are differentiated. Gradients are
    constrained to the `shardings` of the latter: with fsdp XLA reduce-scatters them instead of all-reducing.
    """

    def step(state: TrainState, batch: Batch, frozen_params: Params = NO_FROZEN_PARAMS) -> tuple[TrainState, Metrics]:
        loss_and_grads = jax.value_and_grad(lambda params, part: loss(params | frozen_params, part), has_aux=True)

        def gradients(microbatch: Batch) -> tuple[Params, Metrics]:
            (_, metrics), grads = loss_and_grads(state.params, microbatch)
            return jax.lax.with_sharding_constraint(grads, shardings), metrics

        if grad_accum_steps == 1:
            grads, metrics = gradients(batch)
        else:
            microbatches = jax.tree.map(lambda x: x.reshape(grad_accum_steps, -1, *x.shape[1:]), batch)
            abstract = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], microbatches))

            def accumulate(total: Any, microbatch: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradients(microbatch)), None

            summed, _ = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, abstract), microbatches)
            grads, metrics = jax.tree.map(lambda x: x / grad_accum_steps, summed)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_eval_step(
    graph: nnx.GraphDef, dtype: jnp.dtype
) -> Callable[[Params, Batch], tuple[Bool[Array, "batch text"], Bool[Array, "batch text"], Array]]:
    """model params, batch -> `answer_correctness` of the batch, and the expert load of each layer [layers, experts].

    `dtype` is the compute dtype.
    """

    def evaluate(params: Params, batch: Batch):
        weights = jax.tree.map(lambda p: p.astype(dtype), params)
        logits, intermediates = bind(graph, weights)(batch["tokens"], batch.get("images"), batch.get("segment_ids"))
        _, correct, loss_mask = next_token_losses(logits, batch["labels"])
        return *answer_correctness(correct, loss_mask), intermediates["layers"]["routing"].expert_load

    return evaluate
