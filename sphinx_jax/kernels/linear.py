"""Linear projections: `matmul` for any shapes, with a custom gradient on CPU and a matrix-vector kernel on GPU."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import sharding
from sphinx_jax.kernels.quantized import Quantized, Weight

_Inputs = Float[Array, "*rows in"]
_Matrix = Float[Array, "in *out"]


def matmul(x: _Inputs, w: _Matrix) -> Float[Array, "..."]:
    """x @ w, of shape [*rows, *out]: any number of dimensions before and after the contracted one."""
    if sharding.platform() == "cpu":
        return _matmul_cpu(x, w)
    if x.size == x.shape[-1]:
        return matvec(x.reshape(-1), w).reshape(*x.shape[:-1], *w.shape[1:])
    return jnp.tensordot(x, w, axes=1)


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


def gathered_matvec(x: Float[Array, "in"], w: Weight, index: Int[Array, ""]) -> Float[Array, "*out"]:
    """x @ w[index] with w[n, in, *out], accumulated in float32; the matrix is read in place."""
    if sharding.platform() != "cpu" or isinstance(w, Quantized):
        return matvec(x, gathered_matrix(w, index).astype(x.dtype))
    # XLA:CPU copies a dynamic slice before a dot, but not before an elementwise sum of its rows.
    matrix_rows = w.reshape(w.shape[0] * x.shape[0], -1)
    return _weighted_row_sum(x.astype(jnp.float32), matrix_rows, index).reshape(w.shape[2:]).astype(w.dtype)


def _single_cpu_kernel(function: Callable) -> Callable:
    """`function` compiled by XLA:CPU to one kernel, loops included: otherwise each loop step costs a kernel launch.

    XLA sets this attribute on small loops itself; a compiler that does not know it ignores it. The gradient is compiled
    without it: not all of its operations may be part of such a kernel, and it is no faster as one.
    """
    attributes = ("xla_cpu_small_call", "true"), ("inlineable", "false")

    @jax.jit
    def unmarked(*args):
        with set_xla_metadata(**{name: None for name, _ in attributes}):
            return function(*args)

    @jax.custom_vjp
    def marked(*args):
        with set_xla_metadata(**dict(attributes)):
            return unmarked(*args)

    marked.defvjp(lambda *args: jax.vjp(function, *args), lambda vjp, dy: vjp(dy))
    return marked


@_single_cpu_kernel
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
    return jnp.tensordot(x, w, axes=1)


def _matmul_cpu_forward(x: _Inputs, w: _Matrix) -> tuple[Float[Array, "..."], tuple[_Inputs, _Matrix]]:
    return _matmul_cpu(x, w), (x, w)


def _matmul_cpu_backward(residuals: tuple[_Inputs, _Matrix], dy: Float[Array, "..."]) -> tuple[_Inputs, _Matrix]:
    x, w = residuals
    rows, matrix = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
    dy = dy.reshape(-1, matrix.shape[1])
    return (dy @ matrix.T).reshape(x.shape), outer(rows, dy, w.dtype).reshape(w.shape)


_matmul_cpu.defvjp(_matmul_cpu_forward, _matmul_cpu_backward)
