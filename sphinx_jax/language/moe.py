"""The mixture of experts: a top-k router and SwiGLU experts.

Dropless: there is no expert capacity, so every token gets all of its k experts whatever the expert load.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sharding import constrain, local_index, sharded_map
from sphinx_jax.config import DecoderConfig, LoraConfig
from sphinx_jax.kernels.moe import can_use_grouped_matmul, moe_ffn
from sphinx_jax.kernels.moe_sorted_blocks import LoraFactors, WIn, WOut
from sphinx_jax.kernels.quantized import Weight
from sphinx_jax.layers import LowRank, fan_in_normal, param


class Routing(NamedTuple):
    """The router's output for the tokens of one layer."""

    logits: Float[Array, "batch length experts"]
    experts: Int[Array, "batch length k"]
    weights: Float[Array, "batch length k"]
    expert_load: Float[Array, "experts"]
    """The fraction of all token-to-expert assignments per expert; sums to 1."""
    balance_loss: Float[Array, ""]


def route(logits: Float[Array, "batch length experts"], k: int) -> Routing:
    """Softmax over all experts in float32, then the top k with their weights scaled to sum to 1.

    The load-balancing loss is E x sum over experts of (expert load) x (mean probability), 1 for a uniform load (Switch
    Transformer, https://arxiv.org/abs/2101.03961, equation 4, for top-k).
    """
    num_experts = logits.shape[-1]
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    # [batch, length, k, experts]: whether the expert has the i-th largest probability of the token.
    selected = _rank(probabilities)[..., None, :] == jnp.arange(k)[:, None]
    experts = jnp.sum(jnp.where(selected, jnp.arange(num_experts), 0), axis=-1, dtype=jnp.int32)
    weights = jnp.sum(jnp.where(selected, probabilities[..., None, :], 0), axis=-1)
    weights = weights / sum(weights[..., i : i + 1] for i in range(k))
    expert_load = selected.sum(axis=(0, 1, 2), dtype=jnp.float32) / experts.size
    balance_loss = num_experts * jnp.dot(expert_load, probabilities.mean(axis=(0, 1)))
    return Routing(logits, experts, weights, expert_load, balance_loss)


def _rank(values: Float[Array, "*batch n"]) -> Int[Array, "*batch n"]:
    """The rank of each value along the last axis, 0 for the largest; of equal values the first ranks first.

    Elementwise, so that XLA fuses it into its consumer: in a decode step launching kernels takes longer here than
    computing. `lax.top_k` would be a kernel of its own, and XLA does not partition it: the batch would be all-gathered.
    """
    n = values.shape[-1]

    def precedes(i: int) -> Bool[Array, "*batch n"]:
        """Whether value i ranks before each of the others."""
        value = values[..., i : i + 1]
        return (value > values) | (value == values) & (jnp.arange(n) > i)

    ranks = precedes(0).astype(jnp.int32)
    for i in range(1, n):
        ranks += precedes(i).astype(jnp.int32)
    return ranks


_WEIGHTS = ("experts", None, None, "mlp"), ("experts", "mlp", None)
_FACTORS = (
    *(("experts", None, None), ("experts", None, None, "mlp"), ("experts", "mlp", None), ("experts", None, None)),
    ("batch", "sequence", None),
)
"""Of the LoRA factors, and of the rank mask of each token."""


class MoE(nnx.Module):
    """Router and SwiGLU experts; the gate and up projections are one array and one product."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        experts, dim, hidden = config.num_experts, config.dim, config.hidden_dim
        self.router = param(rngs, (dim, experts), ("embed_small", None), fan_in_normal(dim))
        self.w_in = param(rngs, (experts, dim, 2, hidden), ("experts", "embed", None, "mlp"), fan_in_normal(dim))
        self.w_out = param(rngs, (experts, hidden, dim), ("experts", "mlp", "embed"), fan_in_normal(hidden))
        self.w_in_lora = LowRank(self.w_in, lora, stack=1, rngs=rngs) if lora else None
        self.w_out_lora = LowRank(self.w_out, lora, stack=1, rngs=rngs) if lora else None
        self.k = config.experts_per_token

    @jax.named_scope("moe")
    def __call__(
        self, x: Float[Array, "batch length dim"], rank_mask: Float[Array, "batch rank"] | None = None
    ) -> tuple[Float[Array, "batch length dim"], Routing]:
        """The experts' output, and the routing. `rank_mask`: see `layers.LowRank`."""
        routing = self.route(x)
        with jax.named_scope("experts"):
            return self._experts(x, routing, rank_mask), routing

    @jax.named_scope("router")
    def route(self, x: Float[Array, "batch length dim"]) -> Routing:
        """The routing alone. float32 router logits, whatever the dtype of `x`."""
        logits = jnp.dot(x, self.router[...].astype(x.dtype), preferred_element_type=jnp.float32)
        # With sequence parallelism the router runs on sharded tokens, and its logits are all-gathered: num_experts
        # values per token instead of dim, and one collective instead of one for each output of `route`.
        logits = constrain(logits, "batch", "residual", None)
        return route(constrain(logits, "batch", "sequence", None), self.k)

    def _experts(
        self, x: Float[Array, "batch length dim"], routing: Routing, rank_mask: Float[Array, "batch rank"] | None
    ) -> Float[Array, "batch length dim"]:
        """The weighted sum of each token's k experts, computed on local shards and reduced over the devices."""
        factors = ()
        if self.w_in_lora is not None and self.w_out_lora is not None:
            factors = (*self.w_in_lora.factors(x.dtype), *self.w_out_lora.factors(x.dtype))
            if rank_mask is not None:
                of_tokens = jnp.broadcast_to(rank_mask[:, None], (*x.shape[:2], rank_mask.shape[1]))
                factors = (*factors, of_tokens)
        compute = sharded_map(
            functools.partial(_local_experts_sum, routing.logits.shape[-1]),
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
        return constrain(y, "batch", "residual", None)


def _local_experts_sum(
    num_experts: int,
    x: Float[Array, "batch length dim"],
    experts: Int[Array, "batch length k"],
    weights: Float[Array, "batch length k"],
    w_in: WIn,
    w_out: WOut,
    *factors: Float[Array, "..."],
) -> Float[Array, "batch length dim"]:
    """The contribution of this device's experts, and its shard of their hidden dimension, to each of its tokens.

    The router's weights are applied and the k results summed locally, so that the all-reduce is of [tokens, dim] and
    not of [tokens x k, dim].
    """
    dim, k = x.shape[-1], experts.shape[-1]
    local = local_index(experts.reshape(-1, k), "experts", num_experts)
    rows, weights = x.reshape(-1, dim), weights.reshape(-1, k)
    rank_mask = factors[4].reshape(len(rows), -1) if len(factors) > 4 else None
    lora = cast(LoraFactors, factors[:4])
    return moe_ffn(rows, local, weights, w_in, w_out, factors=lora, rank_mask=rank_mask).reshape(x.shape)


SINGLE_EXPERT = {"w_in": ("embed", None, "expert_mlp"), "w_out": ("expert_mlp", "embed")}
"""Logical axes of the matrices of an expert that is not stacked with others. Its hidden dimension is sharded over all
model-parallel devices: they compute each expert together, as any of them may be the only one chosen."""


@jax.named_scope("experts")
def expert_output(
    x: Float[Array, "batch length dim"], selected: Bool[Array, "batch length"], w_in: Weight, w_out: Weight
) -> Float[Array, "batch length dim"]:
    """What one expert gives for the tokens that `selected` it, before the router's weight; zero for the others.

    `w_in` [dim, 2, hidden] and `w_out` [hidden, dim], sharded as `SINGLE_EXPERT`.
    """
    compute = sharded_map(
        _local_expert_output,
        in_names=(("batch", "residual", None), ("batch", "residual"), (None, None, "expert_mlp"), ("expert_mlp", None)),
        out_names=("batch", "residual", None),
        sum_over=("expert_mlp",),
        gather=("residual",),
    )
    return constrain(compute(x, selected, w_in, w_out), "batch", "residual", None)


def _local_expert_output(
    x: Float[Array, "batch length dim"], selected: Bool[Array, "batch length"], w_in: Weight, w_out: Weight
) -> Float[Array, "batch length dim"]:
    """`moe_ffn` with one expert: a token that did not select it is assigned to one elsewhere."""
    rows, ids = x.reshape(-1, x.shape[-1]), jnp.where(selected, 0, 1).reshape(-1, 1)
    w_in, w_out = (jax.tree.map(lambda array: array[None], w) for w in (w_in, w_out))
    # One token: a matrix-vector product, as when it is computed with all experts at hand.
    is_vector = len(rows) == 1 and not can_use_grouped_matmul(rows, w_in)
    weights = jnp.ones(ids.shape, x.dtype)
    return moe_ffn(rows, ids, weights, w_in, w_out, "gather" if is_vector else None).reshape(x.shape)
