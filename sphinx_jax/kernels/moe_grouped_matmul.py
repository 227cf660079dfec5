"""SwiGLU experts on assignments permuted by expert, with the kernels of `grouped_matmul`.

Each product over all experts is one kernel, forward and backward, on arrays of [assignments, width]; between the
kernels rows are gathered. No token is dropped, and the matrices of experts without rows are not read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sphinx_jax.kernels.grouped_matmul import (
    TILE_ROWS,
    WIDTH_MULTIPLE,
    Groups,
    grouped_matmul,
    grouped_outer,
    grouped_swiglu,
)
from sphinx_jax.kernels.moe_sorted_blocks import ExpertIds, RouterWeights, Tokens
from sphinx_jax.kernels.quantized import Weight

MAX_UNSORTED_ASSIGNMENTS = 8
"""Up to so many assignments, a tile for each takes less time than counting and sorting them."""

_WIn = Float[Array, "experts dim 2 hidden"]
_WOut = Float[Array, "experts hidden dim"]


def supports_grouped_matmul(x: Tokens, w_in: Weight) -> bool:
    """Whether the kernels take these sizes and dtypes."""
    sizes = w_in.shape[1], w_in.shape[3]
    if not isinstance(w_in, jax.Array) or w_in.dtype != x.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    return not any(size % WIDTH_MULTIPLE for size in sizes)


class PermutedAssignments(NamedTuple):
    """The row of each assignment, and the token of each row."""

    groups: Groups
    """The rows of each expert."""
    row: Int[Array, "tokens k"]
    """One past the last row for an assignment to an expert elsewhere."""
    token: Int[Array, "rows"]
    """One past the last token for a row without an assignment."""

    @classmethod
    def sort(cls, experts: ExpertIds, num_experts: int) -> "PermutedAssignments":
        """One row per assignment, those of an expert consecutive."""
        tokens, k = experts.shape
        # Large tiles if the experts have at least one large tile each on average.
        tile_rows = TILE_ROWS[experts.size >= TILE_ROWS[1] * num_experts]
        flat = experts.reshape(-1)
        # A counting sort: an assignment's row is its expert's first row plus the number of earlier ones of the expert.
        one_hot = flat[:, None] == jnp.arange(num_experts)
        so_far = jnp.cumsum(one_hot, axis=0, dtype=jnp.int32)
        groups = Groups.from_counts(so_far[-1], flat.size // tile_rows + num_experts, tile_rows)
        rows = groups.group_of_tile.size * tile_rows
        # For an assignment to an expert elsewhere one_hot is all zero.
        row = jnp.sum(jnp.where(one_hot, groups.first + so_far - 1, 0), axis=1)
        row = jnp.where(flat < num_experts, row, rows)
        token = jnp.full(rows, tokens, jnp.int32).at[row].set(jnp.arange(flat.size) // k, mode="drop")
        return cls(groups, row.reshape(tokens, k), token)

    @classmethod
    def tile_per_assignment(cls, experts: ExpertIds, num_experts: int) -> "PermutedAssignments":
        """One tile per assignment, in the order of the assignments, filled with copies of its token.

        Tiles of the same expert are computed at the same time, so its matrices are read from memory once.
        """
        index, tile_rows = jnp.arange(experts.size, dtype=jnp.int32), TILE_ROWS[0]
        local = experts < num_experts
        count = local.reshape(-1).astype(jnp.int32)
        groups = Groups(count, index * tile_rows, experts.reshape(-1), count, jnp.full(1, experts.size, jnp.int32))
        row = jnp.where(local, groups.first.reshape(experts.shape), experts.size * tile_rows)
        return cls(groups, row, jnp.repeat(index // experts.shape[1], tile_rows))

    def permute(self, x: Float[Array, "tokens width"]) -> Float[Array, "rows width"]:
        """The token of each row; zero for a row without an assignment."""
        return jnp.take(x, self.token, axis=0, mode="fill", fill_value=0)

    def unpermute(self, rows: Float[Array, "rows width"]) -> Float[Array, "tokens k width"]:
        """The row of each assignment; zero for an assignment to an expert elsewhere."""
        return jnp.take(rows, self.row, axis=0, mode="fill", fill_value=0)


_Residuals = tuple[Tokens, RouterWeights, _WIn, _WOut, PermutedAssignments, Float[Array, "rows gate_up"]]


@jax.custom_vjp
def moe_grouped_matmul(x: Tokens, experts: ExpertIds, weights: RouterWeights, w_in: _WIn, w_out: _WOut) -> Tokens:
    """y[t] = sum over j of weights[t, j] x expert_{experts[t, j]}(x[t]); see `kernels.moe`."""
    if experts.size <= MAX_UNSORTED_ASSIGNMENTS:
        permuted = PermutedAssignments.tile_per_assignment(experts, w_in.shape[0])
    else:
        permuted = PermutedAssignments.sort(experts, w_in.shape[0])
    hidden = grouped_swiglu(permuted.permute(x), w_in, permuted.groups)
    return _weighted_sum(grouped_matmul(hidden, w_out, permuted.groups), weights, permuted)


def _weighted_sum(rows: Float[Array, "rows dim"], weights: RouterWeights, permuted: PermutedAssignments) -> Tokens:
    return jnp.sum(permuted.unpermute(rows) * weights[..., None], axis=1)


def _merge_gate_up(w_in: _WIn) -> Float[Array, "experts dim gate_up"]:
    return w_in.reshape(*w_in.shape[:2], -1)


def _swiglu(gate_up: Float[Array, "rows gate_up"]) -> Float[Array, "rows hidden"]:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _forward(
    x: Tokens, experts: ExpertIds, weights: RouterWeights, w_in: _WIn, w_out: _WOut
) -> tuple[Tokens, _Residuals]:
    """Unlike the primal function it stores gate and up, and so applies SwiGLU outside of the kernel."""
    permuted = PermutedAssignments.sort(experts, w_in.shape[0])
    # Without the barrier XLA clones the kernel: one call for the hidden vectors, one for the residuals.
    gate_up = jax.lax.optimization_barrier(grouped_matmul(permuted.permute(x), _merge_gate_up(w_in), permuted.groups))
    y = _weighted_sum(grouped_matmul(_swiglu(gate_up), w_out, permuted.groups), weights, permuted)
    return y, (x, weights, w_in, w_out, permuted, gate_up)


def _backward(residuals: _Residuals, dy: Tokens) -> tuple[Tokens, None, RouterWeights, _WIn, _WOut]:
    x, weights, w_in, w_out, permuted, gate_up = residuals
    groups = permuted.groups
    # Router weight of each row, [rows, 1].
    weight = (
        jnp.zeros(permuted.token.size, jnp.float32)
        .at[permuted.row]
        .set(weights.astype(jnp.float32), mode="drop")[:, None]
    )
    dout = permuted.permute(dy)
    # dout is the gradient of the weighted output. dout w_out' dotted with the hidden vector is the gradient of the
    # router weight; times the router weight it is the gradient of the hidden vector.
    dhidden = grouped_matmul(dout, w_out, groups, transposed=True)
    hidden, swiglu_vjp = jax.vjp(_swiglu, gate_up)
    dweight = jnp.sum(hidden.astype(jnp.float32) * dhidden.astype(jnp.float32), axis=1, keepdims=True)
    (dgate_up,) = swiglu_vjp((dhidden * weight).astype(x.dtype))
    # Rows without an assignment are zero in the left side of the first product and in the right side of the second.
    dw_in = grouped_outer(permuted.permute(x), dgate_up, groups).reshape(w_in.shape)
    dw_out = grouped_outer(hidden, (dout * weight).astype(x.dtype), groups)
    dx = jnp.sum(permuted.unpermute(grouped_matmul(dgate_up, _merge_gate_up(w_in), groups, transposed=True)), axis=1)
    return dx, None, permuted.unpermute(dweight)[..., 0].astype(weights.dtype), dw_in, dw_out


moe_grouped_matmul.defvjp(_forward, _backward)
