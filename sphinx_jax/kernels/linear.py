"""Linear projections: `matmul` for any shapes, with a custom gradient on CPU, and matrix-vector products."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import sharding
from sphinx_jax.kernels.native_matvec import native_matvecs, runs_natively
from sphinx_jax.kernels.quantized import Quantized, Weight
from sphinx_jax.kernels.quantized_matmul import quantized_matvec, quantized_product
from sphinx_jax.kernels.single_cpu_kernel import single_cpu_kernel

MAX_NATIVE_ROWS = 32
"""Of a product with a quantized matrix on a CPU. `native_matvec` reads the integers for each row; XLA writes and reads
the matrix in the dtype of `x` once."""

_Inputs = Float[Array, "*rows in"]
_Matrix = Float[Array, "in *out"]


def matmul(x: _Inputs, w: Weight) -> Float[Array, "..."]:
    """x @ w, of shape [*rows, *out]: any number of dimensions before and after the contracted one."""
    if sharding.platform() != "cpu" and x.size == x.shape[-1]:
        return matvec(x.reshape(-1), w.astype(x.dtype)).reshape(*x.shape[:-1], *w.shape[1:])
    if sharding.platform() != "cpu" or isinstance(w, Quantized):
        return dot(x, w)
    return _matmul_cpu(x, w.astype(x.dtype))


def dot(x: _Inputs, w: Weight) -> Float[Array, "..."]:
    """x @ w as one dot: a `w` that is sharded along the contracted dimension too is read in place.

    A quantized `w` is frozen: it has no gradient.
    """
    if isinstance(w, Quantized):
        return _quantized_dot(x, w)
    w = w.astype(x.dtype)
    return _matmul_cpu(x, w) if _runs_natively(x, w) else jnp.tensordot(x, w, axes=1)


@jax.custom_vjp
def _quantized_dot(x: _Inputs, w: Quantized) -> Float[Array, "..."]:
    rows, stack = x.reshape(-1, x.shape[-1]), _stack_of_one(w)
    if len(rows) <= MAX_NATIVE_ROWS and runs_natively(x, stack):
        y = gathered_matvecs(rows, stack, jnp.zeros(len(rows), jnp.int32))
        return y.reshape(*x.shape[:-1], *w.shape[1:])
    if len(rows) == 1 and sharding.device_count() == 1:
        # With several devices the sums over the matrix might contain collectives.
        return _quantized_row(x.reshape(-1), w).reshape(*x.shape[:-1], *w.shape[1:])
    y = quantized_product(jnp.dot, x, w)
    return y.reshape(*x.shape[:-1], *w.shape[1:])


def _quantized_dot_forward(x: _Inputs, w: Quantized) -> tuple[Float[Array, "..."], Quantized]:
    # The integers are kept for the backward pass; autodiff would keep the dequantized matrix.
    return _quantized_dot(x, w), w


def _quantized_dot_backward(w: Quantized, dy: Float[Array, "..."]) -> tuple[_Inputs, None]:
    matrix = w.astype(dy.dtype).reshape(w.shape[0], -1)
    rows = dy.shape[: dy.ndim - len(w.shape) + 1]
    return dy.reshape(*rows, -1) @ matrix.T, None


_quantized_dot.defvjp(_quantized_dot_forward, _quantized_dot_backward)


def _quantized_row(x: Float[Array, "in"], w: Quantized) -> Float[Array, "*out"]:
    """x @ w; the integers are read in place."""
    if sharding.platform() == "cpu":
        return _only_matrix(x, w)
    return matvec(x, w.astype(x.dtype))


def _only_matrix(x: Float[Array, "in"], w: Weight) -> Float[Array, "*out"]:
    """x @ w as a product with the only matrix of a stack."""
    return gathered_matvecs(x[None], _stack_of_one(w), jnp.zeros(1, jnp.int32))[0]


def _runs_natively(x: _Inputs, w: Weight) -> bool:
    return x.size == x.shape[-1] and runs_natively(x, _stack_of_one(w))


def _stack_of_one(w: Weight) -> Weight:
    return jax.tree.map(lambda array: array[None], w)


def matvec(x: Float[Array, "in"], w: _Matrix) -> Float[Array, "*out"]:
    """x @ w accumulated in float32; XLA:GPU compiles it to one kernel that reads `w` in place.

    XLA lowers a matrix product with one row to multiply and reduce, but may materialise the products, and starts one
    thread block per 128 columns, which leaves most multiprocessors idle. Hence the sum in chunks of the contracted
    dimension; the barrier keeps XLA from merging the two sums. A `w` sliced from a stack at run time is not copied.
    """
    chunk = math.gcd(x.shape[0], 256)
    w = w.reshape(-1, chunk, *w.shape[1:])
    x = x.reshape(-1, chunk, *(1,) * (w.ndim - 2))
    partial_sums = jnp.sum(x.astype(jnp.float32) * w.astype(jnp.float32), axis=1)
    return jax.lax.optimization_barrier(partial_sums).sum(axis=0).astype(w.dtype)


def gathered_matrix(w: Weight, index: int | Int[Array, ""]) -> Weight:
    """w[index]; a quantized stack gives a quantized matrix."""
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), w)


def gathered_matvecs(x: Float[Array, "rows in"], w: Weight, index: Int[Array, "rows"]) -> Float[Array, "rows *out"]:
    """x[r] @ w[index[r]] for each row, with w[n, in, *out], accumulated in float32; the matrices are read in place."""
    return _native_matvecs(x, w, index) if runs_natively(x, w) else _matvecs_in_xla(x, w, index)


def _matvecs_in_xla(x: Float[Array, "rows in"], w: Weight, index: Int[Array, "rows"]) -> Float[Array, "rows *out"]:
    return jnp.stack([_gathered_matvec(row, w, i) for row, i in zip(x, index, strict=True)])


def _gathered_matvec(x: Float[Array, "in"], w: Weight, index: Int[Array, ""]) -> Float[Array, "*out"]:
    """x @ w[index] in an XLA program."""
    if sharding.platform() != "cpu":
        return matvec(x, gathered_matrix(w, index).astype(x.dtype))
    if isinstance(w, Quantized):
        return quantized_matvec(x, w, index)
    # XLA:CPU copies a dynamic slice before a dot, but not before an elementwise sum of its rows.
    matrix_rows = w.reshape(w.shape[0] * x.shape[0], -1)
    return _weighted_row_sum(x.astype(jnp.float32), matrix_rows, index).reshape(w.shape[2:]).astype(x.dtype)


@jax.custom_vjp
def _native_matvecs(x: Float[Array, "rows in"], w: Weight, index: Int[Array, "rows"]) -> Float[Array, "rows *out"]:
    return native_matvecs(x, w, index)


_native_matvecs.defvjp(lambda *args: jax.vjp(_matvecs_in_xla, *args), lambda vjp, dy: vjp(dy))


@single_cpu_kernel
def _weighted_row_sum(
    x: Float[Array, "in"], matrix_rows: Float[Array, "n_in width"], index: Int[Array, ""]
) -> Float[Array, "width"]:
    """Sum over i of x[i] times row i of matrix number `index`."""

    def add_row(i, y):
        return y + x[i] * jax.lax.dynamic_index_in_dim(matrix_rows, index * len(x) + i, keepdims=False).astype(x.dtype)

    return jax.lax.fori_loop(0, len(x), add_row, jnp.zeros_like(matrix_rows, x.dtype, shape=matrix_rows.shape[1:]))


def outer(x: Float[Array, "rows in"], y: Float[Array, "rows out"], dtype: DTypeLike) -> Float[Array, "in out"]:
    """x' y, the gradient of a matrix. XLA:CPU is up to twice as fast if x is transposed before the product."""
    return jnp.dot(jax.lax.optimization_barrier(x.T), y, preferred_element_type=dtype)


@jax.custom_vjp
def _matmul_cpu(x: _Inputs, w: _Matrix) -> Float[Array, "..."]:
    if _runs_natively(x, w):
        return _only_matrix(x.reshape(-1), w).reshape(*x.shape[:-1], *w.shape[1:])
    return jnp.tensordot(x, w, axes=1)


def _matmul_cpu_forward(x: _Inputs, w: _Matrix) -> tuple[Float[Array, "..."], tuple[_Inputs, _Matrix]]:
    return _matmul_cpu(x, w), (x, w)


def _matmul_cpu_backward(residuals: tuple[_Inputs, _Matrix], dy: Float[Array, "..."]) -> tuple[_Inputs, _Matrix]:
    x, w = residuals
    rows, matrix = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
    dy = dy.reshape(-1, matrix.shape[1])
    return (dy @ matrix.T).reshape(x.shape), outer(rows, dy, w.dtype).reshape(w.shape)


_matmul_cpu.defvjp(_matmul_cpu_forward, _matmul_cpu_backward)
