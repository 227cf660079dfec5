"""SwiGLU experts on assignments put group by group, expert by expert, for the kernels of `grouped_matmul`.

Every product over all experts is one kernel, forwards and back, on arrays of [assignments, width]; between them are
gathers of rows. No row is dropped, and experts without rows are not read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sphinx_jax.kernels.grouped_matmul import MULTIPLE, TILES, Groups, grouped_matmul, grouped_outer, grouped_swiglu
from sphinx_jax.kernels.moe_sorted_blocks import Assigned, Tokens, Weights

FEW = 8
"""Most assignments for which counting and sorting takes longer than computing a tile for each."""


def groups_fit(x: Tokens, w_in: Float[Array, "experts dim 2 hidden"]) -> bool:
    """Whether the kernels take matrices of these sizes and numbers of this kind."""
    sizes = w_in.shape[1], w_in.shape[3]
    return x.dtype in (jnp.bfloat16, jnp.float16) and w_in.dtype == x.dtype and not any(n % MULTIPLE for n in sizes)


class Grouped(NamedTuple):
    """Which row each assignment is, and of which token each row is."""

    groups: Groups
    row: Int[Array, "tokens k"]
    """Past the last row for an assignment to no expert here."""
    token: Int[Array, "rows"]
    """Past the last token for a row of none."""

    @classmethod
    def of(cls, experts: Assigned, num_experts: int) -> "Grouped":
        """One row for each assignment, after another in each expert's group."""
        tokens, k = experts.shape
        tile = TILES[experts.size >= TILES[1] * num_experts]
        flat = experts.reshape(-1)
        one_hot = flat[:, None] == jnp.arange(num_experts)
        so_far = jnp.cumsum(one_hot, axis=0, dtype=jnp.int32)
        groups = Groups.of(so_far[-1], flat.size // tile + num_experts, tile)
        rows = groups.group_of_tile.size * tile
        # Of an assignment to no expert here all of one_hot is zero.
        row = jnp.sum(jnp.where(one_hot, groups.first + so_far - 1, 0), axis=1)
        row = jnp.where(flat < num_experts, row, rows)
        token = jnp.full(rows, tokens, jnp.int32).at[row].set(jnp.arange(flat.size) // k, mode="drop")
        return cls(groups, row.reshape(tokens, k), token)

    @classmethod
    def few(cls, experts: Assigned, num_experts: int) -> "Grouped":
        """A tile for each assignment, full of its token: nothing to count or to sort.

        Tiles of the same expert are worked on side by side, so that its matrices come from memory once.
        """
        number, tile = jnp.arange(experts.size, dtype=jnp.int32), TILES[0]
        here = experts < num_experts
        rows = here.reshape(-1).astype(jnp.int32)
        groups = Groups(rows, number * tile, experts.reshape(-1), rows, jnp.full(1, experts.size, jnp.int32))
        row = jnp.where(here, groups.first.reshape(experts.shape), experts.size * tile)
        return cls(groups, row, jnp.repeat(number // experts.shape[1], tile))

    def spread(self, x: Float[Array, "tokens width"]) -> Float[Array, "rows width"]:
        """Each row its token's; zero if it is of none."""
        return jnp.take(x, self.token, axis=0, mode="fill", fill_value=0)

    def back(self, rows: Float[Array, "rows width"]) -> Float[Array, "tokens k width"]:
        """Each assignment its row; zero if it is to no expert here."""
        return jnp.take(rows, self.row, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def moe_grouped_matmul(
    x: Tokens,
    experts: Assigned,
    weights: Weights,
    w_in: Float[Array, "experts dim 2 hidden"],
    w_out: Float[Array, "experts hidden dim"],
) -> Tokens:
    """y[t] = sum over j of weights[t, j] x expert_{experts[t, j]}(x[t]); see `kernels.experts`."""
    grouped = (Grouped.few if experts.size <= FEW else Grouped.of)(experts, w_in.shape[0])
    hidden = grouped_swiglu(grouped.spread(x), w_in, grouped.groups)
    return _weighted(grouped_matmul(hidden, w_out, grouped.groups), weights, grouped)


def _weighted(rows: Float[Array, "rows dim"], weights: Weights, grouped: Grouped) -> Tokens:
    return jnp.sum(grouped.back(rows) * weights[..., None], axis=1)


def _flat(w_in: Float[Array, "experts dim 2 hidden"]) -> Float[Array, "experts dim both"]:
    return w_in.reshape(*w_in.shape[:2], -1)


def _swiglu(gate_up: Float[Array, "rows both"]) -> Float[Array, "rows hidden"]:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _forward(x, experts, weights, w_in, w_out):
    grouped = Grouped.of(experts, w_in.shape[0])
    # Kept apart from where it is stored: XLA would run the kernel once for each of both.
    gate_up = jax.lax.optimization_barrier(grouped_matmul(grouped.spread(x), _flat(w_in), grouped.groups))
    y = _weighted(grouped_matmul(_swiglu(gate_up), w_out, grouped.groups), weights, grouped)
    return y, (x, weights, w_in, w_out, grouped, gate_up)


def _backward(residuals, dy):
    x, weights, w_in, w_out, grouped, gate_up = residuals
    groups = grouped.groups
    weight = (
        jnp.zeros(grouped.token.size, jnp.float32)
        .at[grouped.row]
        .set(weights.astype(jnp.float32), mode="drop")[:, None]
    )
    dout = grouped.spread(dy)
    # Of the unweighted output: times the hidden vector it is the weight's gradient, times the weight the hidden
    # vector's.
    dhidden = grouped_matmul(dout, w_out, groups, transposed=True)
    hidden, pull = jax.vjp(_swiglu, gate_up)
    dweight = jnp.sum(hidden.astype(jnp.float32) * dhidden.astype(jnp.float32), axis=1, keepdims=True)
    (dgate_up,) = pull((dhidden * weight).astype(x.dtype))
    dw_in = grouped_outer(grouped.spread(x), dgate_up, groups).reshape(w_in.shape)
    dw_out = grouped_outer(hidden, (dout * weight).astype(x.dtype), groups)
    dx = jnp.sum(grouped.back(grouped_matmul(dgate_up, _flat(w_in), groups, transposed=True)), axis=1)
    return dx, None, grouped.back(dweight)[..., 0].astype(weights.dtype), dw_in, dw_out


moe_grouped_matmul.defvjp(_forward, _backward)
