"""SwiGLU experts on assignments sorted by expert, in blocks of rows: the arithmetic of the chosen experts alone.

`lax.ragged_dot` multiplies every row by every expert's matrix on CPU and on most GPUs. Instead this is a loop over the
experts that have rows, and for each a loop over blocks of its rows. Trip counts depend on the routing: no token is
dropped. A block goes through the whole expert, from gate to output, while it is in cache.

On a GPU, XLA's products cannot read a matrix that is sliced from a stack at run time: it is copied, once for all blocks
of an expert. Newer compilers' products can read one at a fixed index (`sharding.reads_slices_in_place`): with
`in_place` the loop over experts is unrolled, and each block slices its matrices right before the products. Other
compilers would copy them for each block. The backward pass always copies: unrolled, XLA would store the gradients of
each expert in a buffer of its own until the last.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sphinx_jax.kernels.linear import gathered_matrix, outer
from sphinx_jax.kernels.quantized import Quantized, Weight

Tokens = Float[Array, "tokens dim"]
ExpertIds = Int[Array, "tokens k"]
"""The k experts of each token: assignments. Number `num_experts`, one past the last, is an expert elsewhere."""
RouterWeights = Float[Array, "tokens k"]
WIn = Weight
"""[experts, dim, 2, hidden], gate and up next to each other; may be quantized, and then has no gradient."""
WOut = Weight
"""[experts, hidden, dim], likewise"""
LoraFactors = (
    tuple[()]
    | tuple[
        Float[Array, "experts dim rank"],
        Float[Array, "experts rank 2 hidden"],
        Float[Array, "experts hidden rank"],
        Float[Array, "experts rank dim"],
    ]
)
"""(a_in, b_in, a_out, b_out), or none."""
RankMask = Float[Array, "tokens rank"]
"""1 at the ranks that apply to a token, of several adapters next to each other; 0 at the others."""


def block_sizes(rows: int, experts: int, max_size: int) -> tuple[int, ...]:
    """Block sizes for `rows` rows sorted by `experts` experts: large blocks, and small ones for an expert's remainder.

    Only small blocks are partly filled, by half on average. With small = large / 4 the wasted arithmetic is an eighth
    of a large block per expert. A large block holds up to twice the mean load of an expert, so that one is enough for
    most; with fewer rows than experts it is one row.
    """
    # A power of two, so that the small size divides it.
    large = 1
    while large < max_size and large * experts <= rows:
        large *= 2
    # A quarter of the large size, but not fewer than 4 rows: there a product is limited by reading the matrix.
    small = max(large // 4, min(large, 4))
    return (large, small) if small < large else (large,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 7))
def moe_sorted_blocks(
    x: Tokens,
    experts: ExpertIds,
    weights: RouterWeights,
    w_in: WIn,
    w_out: WOut,
    sizes: tuple[int, ...],
    factors: LoraFactors = (),
    in_place: bool = False,
    rank_mask: RankMask | None = None,
) -> Tokens:
    """y[t] = sum over j of weights[t, j] x expert_{experts[t, j]}(x[t]); see `kernels.moe`.

    `sizes` are block sizes, largest first. With LoRA `factors` an expert's matrices are w_in + a_in b_in and w_out +
    a_out b_out; w_in and w_out are frozen then, and have no gradient. The merged matrices are never computed: rows are
    multiplied by both factors, and nothing as large as the matrices is written, forward or backward.

    `in_place` requires matrices of the dtype of `x`. With a `rank_mask`, for inference, there is no gradient.
    """
    return _forward(x, experts, weights, w_in, w_out, sizes, factors, in_place, rank_mask, save_residuals=False)[0]


class SortedAssignments(NamedTuple):
    """Assignments sorted by expert, those to experts elsewhere last; each sorted assignment is a row."""

    order: Int[Array, "rows"]
    """The assignment of each row."""
    token: Int[Array, "padded"]
    """The token of each row, followed by one block of padding."""
    first: Int[Array, "experts"]
    """The first row of each expert."""
    count: Int[Array, "experts"]
    """Rows of each expert."""
    nonempty_first: Int[Array, "experts"]
    """The experts that have rows, in ascending order; then the others."""

    @classmethod
    def sort(cls, experts: ExpertIds, num_experts: int, padding: int) -> "SortedAssignments":
        # Assignments to experts elsewhere have the largest number, and so are the last rows.
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        count = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        # Assignment t k + j is of token t. Padding rows compute token 0, and nothing reads their results.
        token = jnp.pad(order // experts.shape[1], (0, padding))
        return cls(order, token, jnp.cumsum(count) - count, count, jnp.argsort(count == 0, stable=True))

    def loop_over_experts(self, body: Callable[[Any, Any], Any], carry: Any, unroll: bool = False) -> Any:
        """carry = body(expert, carry) for each expert that has rows; with `unroll`, for all, with static indices."""
        if unroll:
            for expert in range(self.count.size):
                carry = body(expert, carry)
            return carry
        # The trip count is the number of experts that have rows: the matrices of the others are not read.
        return jax.lax.fori_loop(
            0, jnp.sum(self.count > 0), lambda i, carry: body(self.nonempty_first[i], carry), carry
        )

    def loop_over_blocks(
        self,
        expert: int | Int[Array, ""],
        sizes: tuple[int, ...],
        body: Callable[[Any, int, Any], Any],
        carry: Any,
    ) -> Any:
        """carry = body(start, size, carry) for each block of an expert's rows: one loop per block size.

        The last block may extend past the expert's rows, but not past the padding. What it writes there is overwritten
        by the experts of these rows, which come later, or ignored where the rows are of experts elsewhere.
        """
        start, left = self.first[expert], self.count[expert]
        for size in sizes:
            # Full blocks of each size but the last, which takes all rows that are left.
            blocks = left // size if size != sizes[-1] else (left + size - 1) // size

            def step(i, carry, start=start, size=size):
                return body(start + i * size, size, carry)

            carry = jax.lax.fori_loop(0, blocks, step, carry)
            start, left = start + blocks * size, left - blocks * size
        return carry

    def unsort(
        self, rows: Float[Array, "padded width"], experts: ExpertIds, num_experts: int
    ) -> Float[Array, "tokens k width"]:
        """Rows in the order of the assignments, zero where an assignment is to an expert elsewhere."""
        # The argsort of a permutation is its inverse; it drops the padding as well.
        unsorted = rows[jnp.argsort(self.order)].reshape(*experts.shape, *rows.shape[1:])
        local = experts < num_experts
        return jnp.where(local.reshape(*local.shape, *(1,) * (unsorted.ndim - 2)), unsorted, 0)


_slice = jax.lax.dynamic_slice_in_dim
_update = jax.lax.dynamic_update_slice_in_dim


def _expert_matrices(
    stacks: tuple[Weight, ...], expert: int | Int[Array, ""], dtype: DTypeLike
) -> tuple[Float[Array, "_ _"], ...]:
    """(w,) or (w, a, b) of one expert as matrices, gate and up being one; quantized ones are dequantized."""
    # [dim, 2, hidden] becomes [dim, 2 hidden]: gate and up are one product. The LoRA factors likewise.
    matrices = (gathered_matrix(stack, expert).astype(dtype) for stack in stacks)
    return tuple(w.reshape(w.shape[0], -1) for w in matrices)


def _matmul(x, rank_mask, w, a=None, b=None):
    """x w, or with LoRA factors x (w + a b); of these only the ranks in `rank_mask` [size, rank], if there is one."""
    if a is None:
        return x @ w
    # From left to right: [size, rank] is the only intermediate array, and it is small.
    projected = _unmerged(x) @ a
    return x @ w + (projected if rank_mask is None else projected * rank_mask) @ b


def _matmul_dx(dy, w, a=None, b=None):
    """The gradient of `_matmul` with respect to x."""
    return dy @ w.T if a is None or b is None else dy @ w.T + (_unmerged(dy) @ b.T) @ a.T


def _unmerged(x):
    """`x` for a product of its own: XLA:GPU would merge two products with `x`, and copy their matrices for that."""
    return jax.lax.optimization_barrier(x)


def _matmul_dw(x, dy, frozen, w, a=None, b=None):
    """The gradients of `_matmul` with respect to `_trainable(frozen, w, a, b)`, float32."""
    if a is None or b is None:
        return () if frozen else (outer(x, dy, jnp.float32),)
    return outer(x, dy @ b.T, jnp.float32), outer(x @ a, dy, jnp.float32)


def _trainable(frozen, w, *factors):
    """What has a gradient: the LoRA factors if there are any, else the matrix, unless it is `frozen`."""
    return factors if frozen else (w,)


def _forward(
    x: Tokens,
    experts: ExpertIds,
    weights: RouterWeights,
    w_in: WIn,
    w_out: WOut,
    sizes: tuple[int, ...],
    factors: LoraFactors,
    in_place: bool,
    rank_mask: RankMask | None,
    save_residuals: bool,
) -> tuple[Tokens, tuple]:
    """The sum over each token's experts; with `save_residuals` also the sorted assignments, and gate and up by row."""
    num_experts, dim, _, hidden = w_in.shape
    # The stacks of each of the two projections: the matrix, and its LoRA factors if there are any.
    in_stacks, out_stacks = (w_in, *factors[:2]), (w_out, *factors[2:])
    rows = SortedAssignments.sort(experts, num_experts, padding=sizes[0])
    # The buffers depend on the input: XLA hoists constant zeros, and would write those of all layers at the start.
    zero = jnp.where(rows.order[0] < 0, x[0, 0], 0)

    def empty(width):
        return jnp.broadcast_to(zero, (rows.token.size, width))

    def expert(e, carry):
        def slice_matrices():
            return _expert_matrices(in_stacks, e, x.dtype), _expert_matrices(out_stacks, e, x.dtype)

        # One copy for all blocks of the expert, or in place a slice in each block, which a product reads directly.
        copied = None if in_place else slice_matrices()

        def block(start, size, carry):
            # [size, dim] -> [size, 2 hidden] -> [size, dim]: one block stays in cache between the two products.
            w_in, w_out = copied or slice_matrices()
            token = _slice(rows.token, start, size)
            own_ranks = None if rank_mask is None else rank_mask[token]
            gate_up = _matmul(x[token], own_ranks, *w_in)
            gate, up = jnp.split(gate_up, 2, axis=-1)
            out = _matmul(jax.nn.silu(gate) * up, own_ranks, *w_out)
            results = (out, gate_up) if save_residuals else (out,)
            return tuple(_update(buffer, result, start, 0) for buffer, result in zip(carry, results, strict=True))

        return rows.loop_over_blocks(e, sizes, block, carry)

    buffers = (empty(dim), empty(2 * hidden)) if save_residuals else (empty(dim),)
    out, *gate_up = rows.loop_over_experts(expert, buffers, unroll=in_place)
    # The router weights are applied by token, after the rows are back in the order of the assignments.
    y = jnp.sum(rows.unsort(out, experts, num_experts) * weights[..., None], axis=1)
    return y, (rows, *gate_up)


def _vjp_forward(
    x: Tokens,
    experts: ExpertIds,
    weights: RouterWeights,
    w_in: WIn,
    w_out: WOut,
    sizes: tuple[int, ...],
    factors: LoraFactors,
    in_place: bool,
    rank_mask: RankMask | None,
) -> tuple[Tokens, tuple]:
    if rank_mask is not None:
        raise ValueError("experts with a rank mask have no gradient: train one adapter at a time")
    y, residuals = _forward(x, experts, weights, w_in, w_out, sizes, factors, in_place, None, save_residuals=True)
    return y, (x, experts, weights, w_in, w_out, factors, *residuals)


def _vjp_backward(sizes: tuple[int, ...], in_place: bool, residuals: tuple, dy: Tokens) -> tuple:
    """Gradients of x, weights, and w_in and w_out or the LoRA factors; blocks as in the forward pass."""
    x, experts, weights, w_in, w_out, factors, rows, gate_up = residuals
    num_experts, dim = w_in.shape[:2]
    in_stacks, out_stacks = (w_in, *factors[:2]), (w_out, *factors[2:])
    frozen = bool(factors) or isinstance(w_in, Quantized)
    # Router weight of each row, [padded, 1].
    weight = jnp.pad(weights.reshape(-1)[rows.order], (0, sizes[0]))[:, None]

    def expert(e, carry):
        w_in, w_out = _expert_matrices(in_stacks, e, x.dtype), _expert_matrices(out_stacks, e, x.dtype)
        end = rows.first[e] + rows.count[e]

        def block(start, size, carry):
            # Carry: dx and dweight by row, and float32 sums of this expert's gradients over its blocks so far.
            dx, dweight, *sums = carry
            token = _slice(rows.token, start, size)
            # Rows past the expert's last one would add to its gradients: their dy is zero.
            own = (start + jnp.arange(size) < end)[:, None]
            dout = jnp.where(own, dy[token], 0)
            gate, up = jnp.split(_slice(gate_up, start, size), 2, axis=-1)
            swish, swish_vjp = jax.vjp(jax.nn.silu, gate)
            # dout is the gradient of the weighted output. dout w_out' dotted with the hidden vector is the gradient of
            # the router weight; times the router weight it is the gradient of the hidden vector.
            dhidden = _matmul_dx(dout, *w_out)
            dweight = _update(dweight, jnp.sum(swish * up * dhidden, axis=-1, keepdims=True), start, 0)
            row_weight = _slice(weight, start, size)
            dhidden = dhidden * row_weight
            dgate_up = jnp.concatenate([*swish_vjp(dhidden * up), dhidden * swish], axis=-1)
            gradients = (
                *_matmul_dw(x[token], dgate_up, frozen, *w_in),
                *_matmul_dw(swish * up, dout * row_weight, frozen, *w_out),
            )
            sums = map(jnp.add, sums, gradients)
            return _update(dx, _matmul_dx(dgate_up, *w_in), start, 0), dweight, *sums

        def set_expert(stack, gradient):
            return _update(stack, gradient.reshape(1, *stack.shape[1:]).astype(stack.dtype), e, 0)

        # Carry: dx and dweight by row, and the gradients of the stacks, of which this expert's slice is written here.
        dx, dweight, *stacks = carry
        zeros = (jnp.zeros_like(w, jnp.float32) for w in (*_trainable(frozen, *w_in), *_trainable(frozen, *w_out)))
        dx, dweight, *sums = rows.loop_over_blocks(e, sizes, block, (dx, dweight, *zeros))
        return dx, dweight, *map(set_expert, stacks, sums)

    def empty(width):
        return jnp.zeros_like(x, shape=(rows.token.size, width))

    # Experts without rows keep the zero gradient.
    zeros = map(jnp.zeros_like, (*_trainable(frozen, *in_stacks), *_trainable(frozen, *out_stacks)))
    dx, dweight, *gradients = rows.loop_over_experts(expert, (empty(dim), empty(1), *zeros))
    # A token's gradient is the sum over its k rows; the router weight's is that of its own row.
    dx = jnp.sum(rows.unsort(dx, experts, num_experts), axis=1)
    dweights = rows.unsort(dweight, experts, num_experts)[..., 0]
    return dx, None, dweights, *((None, None, tuple(gradients)) if frozen else (*gradients, ())), None


moe_sorted_blocks.defvjp(_vjp_forward, _vjp_backward)
