"""Rows sorted by group, each group times its own matrix: the arithmetic of a mixture of experts.

`lax.ragged_dot` multiplies every row by every group's matrix on CPU and on most GPUs, so the product
is a loop over blocks of rows instead, whose trip count follows the routing: no row is dropped,
and the arithmetic is that of the chosen experts plus at most one partly filled block per group.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def block_rows(rows: int, groups: int) -> int:
    """Rows per block: large enough for efficient products, small enough that padding stays small.

    On average each group wastes half a block, so a block of a quarter of the mean group bounds the
    waste near an eighth; 128 rows are enough to reach a matrix product's full speed.
    """
    target = max(rows // (4 * groups), 1)
    block = 8
    while block < 128 and block * 2 <= target:
        block *= 2
    return block


def grouped_matmul(
    x: Float[Array, "rows in"], w: Float[Array, "groups in out"], sizes: Int[Array, "groups"]
) -> Float[Array, "rows out"]:
    """y[r] = x[r] @ w[group of r], where the first sizes[0] rows are group 0, the next sizes[1] group 1, ...

    Rows past sum(sizes) come out as zeros. Differentiable in `x` and `w`.
    """
    return _grouped_matmul(x, w, sizes, block_rows(x.shape[0], w.shape[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x, w, sizes, block):
    return _forward(x, w, sizes, block)


def _blocks(sizes: Int[Array, "groups"], block: int):
    """How many blocks there are, and a function from a block to (group, first row, rows in the block)."""
    blocks_per_group = (sizes + block - 1) // block
    last_block = jnp.cumsum(blocks_per_group)
    first_row = jnp.cumsum(sizes) - sizes

    def locate(i):
        group = jnp.searchsorted(last_block, i, side="right").astype(jnp.int32)
        within = (i - (last_block[group] - blocks_per_group[group])) * block
        return group, first_row[group] + within, jnp.minimum(sizes[group] - within, block)

    return last_block[-1], locate


def _forward(x, w, sizes, block, transpose=False):
    """The loop over blocks; `transpose` multiplies by w[group]' instead."""
    rows, out_dim = x.shape[0], w.shape[1 if transpose else 2]
    count, locate = _blocks(sizes, block)
    # A block may reach past its group, never past the padding: rows of the next group that it
    # overwrites are written again by that group's own blocks, which come later.
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def body(i, y):
        group, start, filled = locate(i)
        part = jax.lax.dynamic_slice_in_dim(padded, start, block)
        weight = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
        product = jnp.dot(part, weight.T if transpose else weight)
        product = jnp.where(jnp.arange(block)[:, None] < filled, product, 0)
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

    y = jax.lax.fori_loop(0, count, body, jnp.zeros_like(x, shape=(rows + block, out_dim)))
    return y[:rows]


def _weight_gradient(x, dy, sizes, block, groups):
    """dw[g] = x[rows of g]' dy[rows of g], summed over blocks in float32."""
    count, locate = _blocks(sizes, block)
    padded_x = jnp.pad(x, ((0, block), (0, 0)))
    padded_dy = jnp.pad(dy, ((0, block), (0, 0)))

    def body(i, dw):
        group, start, filled = locate(i)
        part_x = jax.lax.dynamic_slice_in_dim(padded_x, start, block)
        part_dy = jax.lax.dynamic_slice_in_dim(padded_dy, start, block)
        part_dy = jnp.where(jnp.arange(block)[:, None] < filled, part_dy, 0)
        product = jnp.dot(part_x.T, part_dy, preferred_element_type=jnp.float32)
        so_far = jax.lax.dynamic_index_in_dim(dw, group)
        return jax.lax.dynamic_update_slice_in_dim(dw, so_far + product, group, 0)

    zeros = jnp.zeros_like(x, jnp.float32, shape=(groups, x.shape[1], dy.shape[1]))
    return jax.lax.fori_loop(0, count, body, zeros)


def _vjp_forward(x, w, sizes, block):
    return _forward(x, w, sizes, block), (x, w, sizes)


def _vjp_backward(block, residuals, dy):
    x, w, sizes = residuals
    dx = _forward(dy, w, sizes, block, transpose=True)
    dw = _weight_gradient(x, dy, sizes, block, w.shape[0]).astype(w.dtype)
    return dx, dw, None


_grouped_matmul.defvjp(_vjp_forward, _vjp_backward)
