"""The mixture of experts: a router that picks two of eight, and the experts it picks.

Dropless: every token is served by all the experts it chose, however uneven the choice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sharding import constrain, local_index, sharded_map
from sphinx_jax.config import DecoderConfig, LoraConfig
from sphinx_jax.kernels.moe import moe_ffn
from sphinx_jax.kernels.moe_sorted_blocks import WIn, WOut
from sphinx_jax.layers import LowRank, fan_in_normal, param


class Routing(NamedTuple):
    """What the router said of one layer's tokens."""

    logits: Float[Array, "batch length experts"]
    experts: Int[Array, "batch length k"]
    weights: Float[Array, "batch length k"]
    share: Float[Array, "experts"]
    """Fraction of all assignments that each expert received; sums to 1."""
    balance_loss: Float[Array, ""]


def route(logits: Float[Array, "batch length experts"], k: int) -> Routing:
    """Softmax over all experts in float32, the best k, their weights scaled to sum to 1.

    The balance loss is E x sum over experts of (share of assignments) x (mean probability): 1 when the
    load is even (Switch Transformer, https://arxiv.org/abs/2101.03961, equation 4, for top-k).
    """
    num_experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    chosen = _rank(probabilities)[..., None, :] == jnp.arange(k)[:, None]
    experts = jnp.sum(jnp.where(chosen, jnp.arange(num_experts), 0), axis=-1, dtype=jnp.int32)
    weights = jnp.sum(jnp.where(chosen, probabilities[..., None, :], 0), axis=-1)
    weights = weights / sum(weights[..., i : i + 1] for i in range(k))
    share = chosen.sum(axis=(0, 1, 2), dtype=jnp.float32) / experts.size
    balance = num_experts * jnp.dot(share, probabilities.mean(axis=(0, 1)))
    return Routing(logits, experts, weights, share, balance)


def _rank(scores: Float[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """How many of the others are larger; of equal ones the first counts as the largest.

    Written out, so that it becomes part of the kernel that needs it: a word spends more time on starting kernels here
    than on computing. `lax.top_k` is one that XLA does not split over devices either: they would gather the whole batch
    before it.
    """
    n = scores.shape[-1]
    larger = lambda i: (scores[..., i : i + 1] > scores) | (scores[..., i : i + 1] == scores) & (jnp.arange(n) > i)
    return sum(larger(i).astype(jnp.int32) for i in range(n))


_WEIGHTS = ("experts", None, None, "mlp"), ("experts", "mlp", None)
_FACTORS = ("experts", None, None), ("experts", None, None, "mlp"), ("experts", "mlp", None), ("experts", None, None)


class MoE(nnx.Module):
    """Router and SwiGLU experts; gate and up projection are one array and one product."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        experts, dim, hidden = config.num_experts, config.dim, config.hidden_dim
        self.router = param(rngs, (dim, experts), ("embed_small", None), fan_in_normal(dim))
        self.w_in = param(rngs, (experts, dim, 2, hidden), ("experts", "embed", None, "mlp"), fan_in_normal(dim))
        self.w_out = param(rngs, (experts, hidden, dim), ("experts", "mlp", "embed"), fan_in_normal(hidden))
        self.w_in_lora = LowRank(self.w_in, lora, stack=1, rngs=rngs) if lora else None
        self.w_out_lora = LowRank(self.w_out, lora, stack=1, rngs=rngs) if lora else None
        self.k = config.experts_per_token

    def __call__(self, x: Float[Array, "batch length dim"]) -> tuple[Float[Array, "batch length dim"], Routing]:
        logits = jnp.dot(x, self.router[...].astype(x.dtype), preferred_element_type=jnp.float32)
        # Of words that are shared out, the scores are sent round: less than the words, and fewer than what follows.
        logits = constrain(logits, "batch", "residual", None)
        routing = route(constrain(logits, "batch", "sequence", None), self.k)
        factors = ()
        if self.w_in_lora is not None:
            factors = (*self.w_in_lora.factors(x.dtype), *self.w_out_lora.factors(x.dtype))
        compute = sharded_map(
            functools.partial(_local_experts_sum, logits.shape[-1]),
            in_names=(
                ("batch", "residual", None),
                *[("batch", "sequence", None)] * 2,
                *_WEIGHTS,
                *_FACTORS[: len(factors)],
            ),
            out_names=("batch", "residual", None),
            sum_over=("experts", "mlp"),
            gather=("residual",),
        )
        y = compute(
            x,
            routing.experts,
            routing.weights.astype(x.dtype),
            self.w_in[...],
            self.w_out[...],
            *factors,
        )
        return constrain(y, "batch", "residual", None), routing


def _local_experts_sum(
    num_experts: int,
    x: Float[Array, "batch length dim"],
    experts: Int[Array, "batch length k"],
    weights: Float[Array, "batch length k"],
    w_in: WIn,
    w_out: WOut,
    *factors: Float[Array, "local_experts ..."],
) -> Float[Array, "batch length dim"]:
    """What this device's experts (and its slice of their hidden dimension) add to each of its tokens.

    The router's weights are applied and the k results added before anything is sent, so that the
    reduction over devices carries [tokens, dim] and not [tokens x k, dim].
    """
    dim, k = x.shape[-1], experts.shape[-1]
    local = local_index(experts.reshape(-1, k), "experts", num_experts)
    return moe_ffn(x.reshape(-1, dim), local, weights.reshape(-1, k), w_in, w_out, factors=factors).reshape(x.shape)
