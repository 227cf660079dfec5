"""Products that read the integers of quantized matrices; the only code besides `quantized` that knows their layout.

A dequantized matrix takes two to eight times the bytes of the integers. Where a product is limited by reading the
matrix, with few rows, it should not be written to memory:

- On a GPU, with one row XLA fuses the conversion into its sum over the matrix. With more, its Triton products convert
  int8 weights themselves, in programs with `sharding.Program.fused_operands`: one scale per output is applied to the
  result. They do not fuse the scales of int4, one per group, in the loop of a decode step (jax 0.12).
- On a CPU, `quantized_matvec` sums the matrix's rows in a loop that converts them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Integer

import sharding
from sphinx_jax.kernels.quantized import Quantized
from sphinx_jax.kernels.single_cpu_kernel import single_cpu_kernel

ROWS_PER_STEP = 8
"""Rows of the matrix that one step of the loop on a CPU adds: the sum is loaded and stored once for all of them."""


def fuses_dequantization(w: Quantized) -> bool:
    """Whether `quantized_product` in the program that is being traced reads the integers of `w`, for any rows."""
    return sharding.fuses_operands() and _has_scale_per_output(w)


def quantized_product(product: Callable[[Array], Array], w: Quantized, dtype: DTypeLike) -> Float[Array, "*rows out"]:
    """product(weights) in `dtype`, with the outputs as one last dimension of weights and result."""
    w = w.with_flat_outputs()
    if not _has_scale_per_output(w):
        return product(w.astype(dtype))
    return (product(w.values.astype(dtype)).astype(jnp.float32) * w.scales.astype(jnp.float32)).astype(dtype)


def _has_scale_per_output(w: Quantized) -> bool:
    return w.num_groups == 1 and w.values.dtype == jnp.int8


def quantized_matvec(x: Float[Array, "in"], w: Quantized, index: Int[ArrayLike, ""]) -> Float[Array, "*out"]:
    """x @ w[index] with w[n, in, *out] on a CPU, accumulated in float32; the integers are read in place."""
    values = w.values.reshape(w.shape[0] * len(x), -1)
    # [n x groups, width of values, outputs of a value]
    scales = w.scales.reshape(w.shape[0] * w.num_groups, values.shape[1], -1)
    return _weighted_row_sum(x.astype(jnp.float32), values, scales, index).reshape(w.shape[2:]).astype(x.dtype)


@single_cpu_kernel
def _weighted_row_sum(
    x: Float[Array, "in"],
    values: Integer[Array, "n_in width"],
    scales: Float[Array, "n_groups width packed"],
    index: Int[ArrayLike, ""],
) -> Float[Array, "width packed"]:
    """Sum over i of x[i] times row i of matrix number `index`. A packed row has two sums: of low and of high halves."""
    num_groups = len(scales) * len(x) // len(values)
    group_size = len(x) // num_groups
    step = math.gcd(group_size, ROWS_PER_STEP)
    row_of = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    zeros = (jnp.zeros_like(values, x.dtype, shape=values.shape[1:]),) * scales.shape[2]

    def add_group(g, sums):
        def add_rows(i, group_sums):
            for row in range(step):
                at = g * group_size + i * step + row
                parts = _halves(row_of(values, index * len(x) + at))
                group_sums = tuple(
                    total + x[at] * part.astype(x.dtype) for total, part in zip(group_sums, parts, strict=True)
                )
            return group_sums

        group_sums = jax.lax.fori_loop(0, group_size // step, add_rows, zeros)
        scale = row_of(scales, index * num_groups + g).astype(x.dtype)
        return tuple(total + part * scale[:, i] for i, (total, part) in enumerate(zip(sums, group_sums, strict=True)))

    return jnp.stack(jax.lax.fori_loop(0, num_groups, add_group, zeros), axis=-1)


def _halves(row: Integer[Array, "width"]) -> tuple[Integer[Array, "width"], ...]:
    """int8 values; of packed ones the low and the high halves of each byte."""
    if row.dtype != jnp.uint8:
        return (row,)
    return (row << 4).astype(jnp.int8) >> 4, row.astype(jnp.int8) >> 4
