"""Linear projections: one function, with a gradient of its own on CPU and a form of its own for one row on a GPU."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, Int

import sharding
from sphinx_jax.kernels.quantized import Quantized, Weight


def matmul(x: Float[Array, "*rows in"], w: Float[Array, "in *out"]) -> Float[Array, "..."]:
    """x @ w of shape [*rows, *out]: any number of dimensions before and behind the one summed over."""
    if sharding.platform() == "cpu":
        return _project_on_cpu(x, w)
    if x.size == x.shape[-1]:
        return matvec(x.reshape(-1), w).reshape(*x.shape[:-1], *w.shape[1:])
    return jnp.tensordot(x, w, axes=1)


def matvec(x: Float[Array, "in"], w: Float[Array, "in *out"]) -> Float[Array, "*out"]:
    """x @ w, summed in float32, in a form that XLA:GPU makes one kernel of that reads `w` in place.

    Of a matrix product with one row XLA makes a sum of products too, but may write the products to memory first,
    and gives a thread block to every 128 columns only, which leaves most processors idle. Hence the sum in parts,
    which the barrier keeps XLA from joining again. A `w` chosen from a stack at run time is not copied out of it.
    """
    part = math.gcd(x.shape[0], 256)
    w = w.reshape(-1, part, *w.shape[1:])
    x = x.reshape(-1, part, *(1,) * (w.ndim - 2))
    parts = jnp.sum(x.astype(jnp.float32) * w.astype(jnp.float32), axis=1)
    return jax.lax.optimization_barrier(parts).sum(axis=0).astype(w.dtype)


def gathered_matrix(w: Weight, index: int | Int[Array, ""]) -> Weight:
    """w[index]; if quantized, it stays so."""
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, index, keepdims=False), w)


def gathered_matvec(x: Float[Array, "in"], w: Weight, index: Int[Array, ""]) -> Float[Array, "*out"]:
    """x @ w[index] with w[n, in, *out], summed in float32, the matrix read in place."""
    if sharding.platform() != "cpu" or isinstance(w, Quantized):
        return matvec(x, gathered_matrix(w, index).astype(x.dtype))
    # XLA:CPU copies what a product is given of a larger array, but not what is added up line by line.
    lines = w.reshape(w.shape[0] * x.shape[0], -1)
    return _sum_of_lines(x.astype(jnp.float32), lines, index).reshape(w.shape[2:]).astype(w.dtype)


def _in_one_kernel(function: Callable) -> Callable:
    """`function` as one kernel of XLA:CPU, with its loops, which else cost more between steps than in them.

    The mark is the one that XLA puts on small loops itself. A compiler that does not know it compiles as ever. The
    gradient goes without: not all that it needs can be part of a kernel, nor is it faster as one.
    """
    marks = ("xla_cpu_small_call", "true"), ("inlineable", "false")

    @jax.jit
    def unmarked(*args):
        with set_xla_metadata(**{name: None for name, _ in marks}):
            return function(*args)

    @jax.custom_vjp
    def marked(*args):
        with set_xla_metadata(**dict(marks)):
            return unmarked(*args)

    marked.defvjp(lambda *args: jax.vjp(function, *args), lambda pull, dy: pull(dy))
    return marked


@_in_one_kernel
def _sum_of_lines(
    x: Float[Array, "in"], lines: Float[Array, "n_in width"], index: Int[Array, ""]
) -> Float[Array, "width"]:
    """The lines of matrix number `index`, each times its number in `x`, added up."""
    line = lambda i: jax.lax.dynamic_index_in_dim(lines, index * len(x) + i, keepdims=False)
    add = lambda i, y: y + x[i] * line(i).astype(x.dtype)
    return jax.lax.fori_loop(0, len(x), add, jnp.zeros_like(lines, x.dtype, shape=lines.shape[1:]))


def outer(x: Float[Array, "rows in"], y: Float[Array, "rows out"], dtype: jnp.dtype) -> Float[Array, "in out"]:
    """x' y, the gradient of a matrix. XLA:CPU is up to twice as fast if x is transposed before the product."""
    return jnp.dot(jax.lax.optimization_barrier(x.T), y, preferred_element_type=dtype)


@jax.custom_vjp
def _project_on_cpu(x, w):
    return jnp.tensordot(x, w, axes=1)


def _forward(x, w):
    return _project_on_cpu(x, w), (x, w)


def _backward(residuals, dy):
    x, w = residuals
    rows, matrix = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
    dy = dy.reshape(-1, matrix.shape[1])
    return (dy @ matrix.T).reshape(x.shape), outer(rows, dy, w.dtype).reshape(w.shape)


_project_on_cpu.defvjp(_forward, _backward)
