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
from sphinx_jax.data.images import CLIP_MEAN, CLIP_STD
from sphinx_jax.kernels.argmax import argmax
from sphinx_jax.kernels.quantized import Quantized
from sphinx_jax.lora_params import join
from sphinx_jax.model import bind

Batch = dict[str, Array]
Params = dict[str, Any]
Metrics = dict[str, Array]
LossFunction = Callable[[Params, Batch], tuple[Float[Array, ""], Metrics]]


class TrainState(NamedTuple):
    """The donated argument of the train step.

    `params` holds "model", and "aux_probe" with an auxiliary loss. With LoRA it holds "adapters" instead of "model",
    and the frozen model is a separate argument of the step.
    """

    step: Any
    """int32 scalar: the number of finished steps."""
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
    correct: Bool[Array, "batch targets"], loss_mask: Bool[Array, "batch targets"]
) -> tuple[Bool[Array, "batch targets+1"], Bool[Array, "batch targets+1"]]:
    """For answer 1, 2, ... of each sequence (second axis): whether all its tokens are correct, and whether it exists.

    An answer is a run of positions with a loss. It is correct if every token has the highest logit given the true
    tokens before it, that is if greedy decoding would generate it.
    """
    starts = loss_mask & ~jnp.pad(loss_mask[:, :-1], ((0, 0), (1, 0)))
    answer_index = jnp.cumsum(starts, axis=1)
    batch_index = jnp.arange(loss_mask.shape[0])[:, None]

    def count(flags: Bool[Array, "batch targets"]) -> Int[Array, "batch answers"]:
        """Positions of each answer where `flags` is set."""
        zeros = jnp.zeros((loss_mask.shape[0], loss_mask.shape[1] + 1), jnp.int32)
        return zeros.at[batch_index, answer_index].add(flags)

    exists = count(loss_mask) > 0
    return exists & (count(loss_mask & ~correct) == 0), exists


class AuxiliaryLoss(NamedTuple):
    """A loss on the intermediates of the forward pass, added to the training loss; its parameters start at zero."""

    params: dict[str, jax.ShapeDtypeStruct]
    """Abstract, replicated."""
    loss: Callable[[Params, dict[str, Any], Batch], tuple[Float[Array, ""], Metrics]]
    """params, the model's intermediates, batch -> weighted loss, metrics."""


def cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """The parameters in `dtype`; quantized ones as they are, since their products dequantize them."""
    return jax.tree.map(
        lambda p: p if isinstance(p, Quantized) else p.astype(dtype), params, is_leaf=lambda p: isinstance(p, Quantized)
    )


def make_loss(
    graph: nnx.GraphDef,
    config: SphinxConfig,
    *,
    trainable: Params | None = None,
    auxiliary_loss: AuxiliaryLoss | None = None,
    remat: str = "none",
    dtype: jax.typing.DTypeLike | None = None,
) -> LossFunction:
    """The training loss of a batch: next-token loss, load-balancing loss, and the auxiliary loss if there is one.

    The batch holds `tokens` and `labels` int[B, T]; optionally `segment_ids` int[B, T] and `images`
    float[B, S, S, 3]; and what the auxiliary loss reads.
    `params` holds "model", with LoRA "adapters", and with an auxiliary loss "aux_probe". `trainable` is a mask of the
    model's parameters (None: all trainable); no gradient is computed for the others.
    `dtype` is the compute dtype; parameters of another dtype, but quantized ones, are cast once.
    """

    def loss(params: Params, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        weights = join(params["model"], params.get("adapters", {}))
        if trainable is not None:
            weights = jax.tree.map(lambda p, keep: p if keep else jax.lax.stop_gradient(p), weights, trainable)
        if dtype is not None:
            weights = cast(weights, dtype)
        logits, intermediates = bind(graph, weights)(
            batch["tokens"], batch.get("images"), batch.get("segment_ids"), remat=remat
        )
        losses, correct, loss_mask = next_token_losses(logits, batch["labels"])
        token_loss = losses.sum(where=loss_mask) / jnp.maximum(loss_mask.sum(), 1)
        answer_correct, answer_exists = answer_correctness(correct, loss_mask)
        routing = intermediates["layers"]["routing"]
        balance_loss = routing.balance_loss.mean()
        metrics = {
            "loss": token_loss,
            "balance_loss": balance_loss,
            "accuracy": answer_correct.sum() / jnp.maximum(answer_exists.sum(), 1),
            "expert_share": routing.expert_load.mean(axis=0),
        }
        total = token_loss + config.balance_weight * balance_loss
        if auxiliary_loss:
            value, auxiliary_metrics = auxiliary_loss.loss(params["aux_probe"], intermediates, batch)
            total, metrics = total + value, metrics | auxiliary_metrics
        return total, metrics

    return loss


def make_train_step(
    loss: LossFunction, optimizer: optax.GradientTransformation, shardings: Params, grad_accum_steps: int = 1
) -> Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]:
    """state, batch, frozen params -> next state, metrics.

    `grad_accum_steps` > 1 splits the batch into so many microbatches and averages their gradients.
    The frozen params complete those of the state for the loss; only the latter are differentiated. Gradients are
    constrained to the `shardings` of the latter: with fsdp XLA reduce-scatters them instead of all-reducing.
    """

    def step(state: TrainState, batch: Batch, frozen_params: Params) -> tuple[TrainState, Metrics]:
        loss_and_grads = jax.value_and_grad(lambda params, part: loss(params | frozen_params, part), has_aux=True)

        def gradients(microbatch: Batch) -> tuple[Params, Metrics]:
            with jax.named_scope("loss"):
                (_, metrics), grads = loss_and_grads(state.params, microbatch)
            return jax.lax.with_sharding_constraint(grads, shardings), metrics

        if grad_accum_steps == 1:
            grads, metrics = gradients(batch)
        else:
            # [batch, ...] -> [grad_accum_steps, batch / grad_accum_steps, ...]; the sums start at zero in float32.
            microbatches = jax.tree.map(lambda x: x.reshape(grad_accum_steps, -1, *x.shape[1:]), batch)
            abstract = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], microbatches))

            def accumulate(total: Any, microbatch: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradients(microbatch)), None

            total, _ = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, abstract), microbatches)
            grads, metrics = jax.tree.map(lambda x: x / grad_accum_steps, total)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_eval_step(
    graph: nnx.GraphDef, dtype: jax.typing.DTypeLike
) -> Callable[
    [Params, Batch], tuple[Bool[Array, "batch text"], Bool[Array, "batch text"], Float[Array, "layers experts"]]
]:
    """params, batch -> `answer_correctness` of the batch, and the expert load of each layer; `dtype`: compute dtype."""

    def step(params: Params, batch: Batch):
        weights = cast(join(params["model"], params.get("adapters", {})), dtype)
        logits, intermediates = bind(graph, weights)(batch["tokens"], batch.get("images"), batch.get("segment_ids"))
        _, correct, loss_mask = next_token_losses(logits, batch["labels"])
        return *answer_correctness(correct, loss_mask), intermediates["layers"]["routing"].expert_load

    return step


def normalise_images(batch: Batch) -> Batch:
    """The batch with its uint8 images as float32, normalised with CLIP's statistics, on the device."""
    if "images" not in batch:
        return batch
    pixels = batch["images"].astype(jnp.float32) / 255
    return batch | {"images": (pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)}
