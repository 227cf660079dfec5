"""SwiGLU experts on assignments sorted by expert, block by block: the arithmetic of the chosen experts alone.

`lax.ragged_dot` multiplies every row by every expert's matrix on CPU and on most GPUs, so this is a loop over the
experts that were chosen, and for each a loop over blocks of its rows. Trip counts follow the routing: no row is
dropped. A block is taken through the whole expert, gate to output, while it lies in cache.

On a GPU a matrix that is chosen at run time is copied out of its stack once for all blocks, as XLA's products take no
such slice. Newer compilers' take one that is fixed in the program (`sharding.reads_slices_in_place`): with `in_place`
the loop over the experts is written out, and a block takes its matrices next to the products. Other compilers would
copy them for each block. Gradients are always computed with copies: written out, XLA keeps those of each expert apart
until the last.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sphinx_jax.kernels.linear import gathered_matrix, outer
from sphinx_jax.kernels.quantized import Weight

Tokens = Float[Array, "tokens dim"]
Assigned = Int[Array, "tokens k"]
Weights = Float[Array, "tokens k"]
WIn = Weight
"""[experts, dim, 2, hidden]; likewise quantized, and then without a gradient."""
WOut = Weight
"""[experts, hidden, dim]"""
Factors = (
    tuple[()]
    | tuple[
        Float[Array, "experts dim rank"],
        Float[Array, "experts rank 2 hidden"],
        Float[Array, "experts hidden rank"],
        Float[Array, "experts rank dim"],
    ]
)


def block_sizes(rows: int, experts: int, largest: int) -> tuple[int, ...]:
    """Rows of an expert's first blocks, and of its last ones: whole large blocks, then small ones for what is left.

    Only small blocks are partly filled, by half on average, so with a quarter of the large size the arithmetic in
    vain is an eighth of a large block an expert. Twice the mean load is large enough for an expert's first block,
    and one row for most experts if there are fewer rows than experts.
    """
    large = 1
    while large < largest and large * experts <= rows:
        large *= 2
    small = max(large // 4, min(large, 4))
    return (large, small) if small < large else (large,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 7))
def moe_sorted_blocks(
    x: Tokens,
    experts: Assigned,
    weights: Weights,
    w_in: WIn,
    w_out: WOut,
    sizes: tuple[int, ...],
    factors: Factors = (),
    in_place: bool = False,
) -> Tokens:
    """y[t] = sum over j of weights[t, j] x expert_{experts[t, j]}(x[t]); see `kernels.experts`.

    `sizes` are the sizes of blocks, largest first. With `factors` (a_in, b_in, a_out, b_out) an expert's matrices are
    w_in + a_in b_in and w_out + a_out b_out; w_in and w_out are constants then, and have no gradient. The sums are
    never made: rows go through both factors, and no array as large as the matrices is written, forwards or back.

    `in_place` is for matrices that hold numbers of the same kind as `x`.
    """
    return _forward(x, experts, weights, w_in, w_out, sizes, factors, in_place, keep=False)[0]


class Sorted(NamedTuple):
    """Assignments sorted by expert, those to no expert here last."""

    order: Int[Array, "rows"]
    token: Int[Array, "padded"]
    """Which token each is of, followed by a block of padding."""
    first: Int[Array, "experts"]
    count: Int[Array, "experts"]
    chosen: Int[Array, "experts"]
    """The experts that have any, in ascending order; then the others."""

    @classmethod
    def of(cls, experts: Assigned, num_experts: int, padding: int) -> "Sorted":
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        count = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        token = jnp.pad(order // experts.shape[1], (0, padding))
        return cls(order, token, jnp.cumsum(count) - count, count, jnp.argsort(count == 0, stable=True))

    def each_expert(self, body, carry, written_out=False):
        """carry = body(expert, carry) for each expert that has rows; if `written_out` for all, by their numbers."""
        if written_out:
            for expert in range(self.count.size):
                carry = body(expert, carry)
            return carry
        step = lambda i, carry: body(self.chosen[i], carry)
        return jax.lax.fori_loop(0, jnp.sum(self.count > 0), step, carry)

    def each_block(self, expert, sizes, body, carry):
        """carry = body(start, size, carry) for each block of an expert's rows.

        A block may reach past its expert's rows, never past the padding. What it writes there is written again by
        the experts that the rows are of, which come later, and is not read if they are of none.
        """
        start, left = self.first[expert], self.count[expert]
        for size in sizes:
            blocks = left // size if size != sizes[-1] else (left + size - 1) // size
            step = lambda i, carry, start=start, size=size: body(start + i * size, size, carry)
            carry = jax.lax.fori_loop(0, blocks, step, carry)
            start, left = start + blocks * size, left - blocks * size
        return carry

    def back(self, rows: Float[Array, "padded dim"], experts: Assigned, num_experts: int) -> Array:
        """Rows in the order of their assignments, zero where an assignment is to no expert here."""
        ours = rows[jnp.argsort(self.order)].reshape(*experts.shape, *rows.shape[1:])
        here = experts < num_experts
        return jnp.where(here.reshape(*here.shape, *(1,) * (ours.ndim - 2)), ours, 0)


_slice = jax.lax.dynamic_slice_in_dim
_update = jax.lax.dynamic_update_slice_in_dim


def _of_expert(matrices: tuple[Weight, ...], expert: int | Int[Array, ""], dtype: jnp.dtype) -> tuple[Array, ...]:
    """One expert's w, or w, a and b, before or behind the nonlinearity. Gate and up are one."""
    one = (gathered_matrix(w, expert).astype(dtype) for w in matrices)
    return tuple(w.reshape(w.shape[0], -1) for w in one)


def _times(x, w, a=None, b=None):
    """x w, or x (w + a b)."""
    return x @ w if a is None else x @ w + (x @ a) @ b


def _times_transposed(dy, w, a=None, b=None):
    """The gradient of `_times` for x."""
    return dy @ w.T if a is None else dy @ w.T + (dy @ b.T) @ a.T


def _learned(w, *factors):
    """What has a gradient: the matrix, or the factors beside it."""
    return factors or (w,)


def _gradients(x, dy, w, a=None, b=None):
    """The gradients of `_times` for what is learned, float32."""
    if a is None:
        return (outer(x, dy, jnp.float32),)
    return outer(x, dy @ b.T, jnp.float32), outer(x @ a, dy, jnp.float32)


def _forward(x, experts, weights, w_in, w_out, sizes, factors, in_place, keep):
    """The sum over each token's experts; if `keep`, also what the gradient needs: the order, and gate and up."""
    num_experts, dim, _, hidden = w_in.shape
    before, behind = (w_in, *factors[:2]), (w_out, *factors[2:])
    rows = Sorted.of(experts, num_experts, sizes[0])
    # Constant zeros are nobody's result, and XLA writes those of all layers before the first begins.
    zero = jnp.where(rows.order[0] < 0, x[0, 0], 0)
    empty = lambda width: jnp.broadcast_to(zero, (rows.token.size, width))

    def expert(e, carry):
        take = lambda: (_of_expert(before, e, x.dtype), _of_expert(behind, e, x.dtype))
        taken = None if in_place else take()

        def block(start, size, carry):
            into, out_of = taken or take()
            gate_up = _times(x[_slice(rows.token, start, size)], *into)
            gate, up = jnp.split(gate_up, 2, axis=-1)
            out = _times(jax.nn.silu(gate) * up, *out_of)
            new = (out, gate_up) if keep else (out,)
            return tuple(_update(whole, part, start, 0) for whole, part in zip(carry, new, strict=True))

        return rows.each_block(e, sizes, block, carry)

    out, *kept = rows.each_expert(expert, (empty(dim), empty(2 * hidden)) if keep else (empty(dim),), in_place)
    return jnp.sum(rows.back(out, experts, num_experts) * weights[..., None], axis=1), (rows, *kept)


def _vjp_forward(x, experts, weights, w_in, w_out, sizes, factors, in_place):
    y, kept = _forward(x, experts, weights, w_in, w_out, sizes, factors, in_place, keep=True)
    return y, (x, experts, weights, w_in, w_out, factors, *kept)


def _vjp_backward(sizes, in_place, residuals, dy):
    x, experts, weights, w_in, w_out, factors, rows, gate_up = residuals
    num_experts, dim = w_in.shape[:2]
    before, behind = (w_in, *factors[:2]), (w_out, *factors[2:])
    weight = jnp.pad(weights.reshape(-1)[rows.order], (0, sizes[0]))[:, None]

    def expert(e, carry):
        into, out_of = _of_expert(before, e, x.dtype), _of_expert(behind, e, x.dtype)
        end = rows.first[e] + rows.count[e]

        def block(start, size, carry):
            dx, dweight, *so_far = carry
            token = _slice(rows.token, start, size)
            own = (start + jnp.arange(size) < end)[:, None]
            dout = jnp.where(own, dy[token], 0)
            gate, up = jnp.split(_slice(gate_up, start, size), 2, axis=-1)
            swish, slope = jax.vjp(jax.nn.silu, gate)
            # Of the unweighted output: times the hidden vector it is the weight's gradient, times the weight the
            # hidden vector's.
            dhidden = _times_transposed(dout, *out_of)
            dweight = _update(dweight, jnp.sum(swish * up * dhidden, axis=-1, keepdims=True), start, 0)
            scale = _slice(weight, start, size)
            dhidden = dhidden * scale
            dgate_up = jnp.concatenate([*slope(dhidden * up), dhidden * swish], axis=-1)
            new = (*_gradients(x[token], dgate_up, *into), *_gradients(swish * up, dout * scale, *out_of))
            added = map(jnp.add, so_far, new)
            return _update(dx, _times_transposed(dgate_up, *into), start, 0), dweight, *added

        dx, dweight, *gradients = carry
        zeros = (jnp.zeros_like(w, jnp.float32) for w in (*_learned(*into), *_learned(*out_of)))
        dx, dweight, *own = rows.each_block(e, sizes, block, (dx, dweight, *zeros))
        put = lambda whole, part: _update(whole, part.reshape(1, *whole.shape[1:]).astype(whole.dtype), e, 0)
        return dx, dweight, *map(put, gradients, own)

    empty = lambda width: jnp.zeros_like(x, shape=(rows.token.size, width))
    zeros = map(jnp.zeros_like, (*_learned(*before), *_learned(*behind)))
    dx, dweight, *gradients = rows.each_expert(expert, (empty(dim), empty(1), *zeros))
    dx = jnp.sum(rows.back(dx, experts, num_experts), axis=1)
    dweights = rows.back(dweight, experts, num_experts)[..., 0]
    return dx, None, dweights, *((None, None, tuple(gradients)) if factors else (*gradients, ()))


moe_sorted_blocks.defvjp(_vjp_forward, _vjp_backward)
