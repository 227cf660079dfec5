"""Linear projections: one function, with a gradient of its own on CPU and a form of its own for one row on a GPU."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import sharding
from sphinx_jax.kernels.quantized import Quantized, Weight


def project(x: Float[Array, "*rows in"], w: Float[Array, "in *out"]) -> Float[Array, "..."]:
    """x @ w of shape [*rows, *out]: any number of dimensions before and behind the one summed over."""
    if sharding.platform() == "cpu":
        return _project_on_cpu(x, w)
    if x.size == x.shape[-1]:
        return vector_matrix(x.reshape(-1), w).reshape(*x.shape[:-1], *w.shape[1:])
    return jnp.tensordot(x, w, axes=1)


def vector_matrix(x: Float[Array, "in"], w: Float[Array, "in *out"]) -> Float[Array, "*out"]:
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


def chosen_matrix(w: Weight, index: Int[Array, ""]) -> Weight:
    """w[index]; if quantized, it stays so."""
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, index, keepdims=False), w)


def vector_chosen_matrix(x: Float[Array, "in"], w: Weight, index: Int[Array, ""]) -> Float[Array, "*out"]:
    """x @ w[index] with w[n, in, *out], summed in float32, the matrix read in place."""
    if sharding.platform() != "cpu" or isinstance(w, Quantized):
        return vector_matrix(x, chosen_matrix(w, index).astype(x.dtype))
    # XLA:CPU copies what a product is given of a larger array, but not what sums of a few lines are.
    length = x.shape[0]
    lines, at_once = w.reshape(w.shape[0] * length, -1), math.gcd(length, 8)

    def add(i, y):
        for line in range(at_once):
            line += i * at_once
            y += x[line].astype(jnp.float32) * jax.lax.dynamic_index_in_dim(
                lines, index * length + line, keepdims=False
            )
        return y

    zeros = jnp.zeros_like(w, jnp.float32, shape=lines.shape[1:])
    return jax.lax.fori_loop(0, length // at_once, add, zeros).reshape(w.shape[2:]).astype(w.dtype)


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
