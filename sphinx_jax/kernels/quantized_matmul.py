"""Products that read the integers of quantized matrices; the only code besides `quantized` that knows their layout.

A dequantized matrix takes two to eight times the bytes of the integers. Where a product is limited by reading the
matrix, with few rows, it should not be written to memory:

- On a GPU, with one row XLA fuses the conversion into its sum over the matrix. With more, its Triton products convert
  int8 weights themselves, in programs with `sharding.Program.fused_operands`: one scale per output is applied to the
  result. They do not fuse the steps and zero points of int4, one per group, in the loop of a decode step (jax 0.12).
- On a CPU, `quantized_matvec` sums the matrix's rows in a loop that converts them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Int8, Integer, UInt8

import sharding
from sphinx_jax.kernels.int4_rounding import ZERO_STEPS
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
    return w.num_groups == 1 and w.steps is None


def quantized_matvec(x: Float[Array, "in"], w: Quantized, index: Int[ArrayLike, ""]) -> Float[Array, "*out"]:
    """x @ w[index] with w[n, in, *out] on a CPU, accumulated in float32; the integers are read in place."""
    values = w.values.reshape(w.shape[0] * len(x), -1)
    # [n x groups, width of values, outputs of a value]
    of_groups = [
        array if array is None else array.reshape(w.shape[0] * array.shape[1], values.shape[1], -1)
        for array in (w.scales, w.steps, w.zeros)
    ]
    return _weighted_row_sum(x.astype(jnp.float32), values, *of_groups, index).reshape(w.shape[2:]).astype(x.dtype)


@single_cpu_kernel
def _weighted_row_sum(
    x: Float[Array, "in"],
    values: Integer[Array, "n_in width"],
    scales: Float[Array, "n_scales width packed"],
    steps: UInt8[Array, "n_groups width packed"] | None,
    zeros: Int8[Array, "n_groups width packed"] | None,
    index: Int[ArrayLike, ""],
) -> Float[Array, "width packed"]:
    """Sum over i of x[i] times row i of matrix number `index`. A packed row has two sums: of low and of high halves."""
    num_scales, num_groups = (
        len(array) * len(x) // len(values) for array in (scales, scales if steps is None else steps)
    )
    group_size = len(x) // num_groups
    rows = math.gcd(group_size, ROWS_PER_STEP)
    row_of = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    nothing = (jnp.zeros_like(values, x.dtype, shape=values.shape[1:]),) * scales.shape[2]

    def add_group(g, sums):
        def add_rows(i, group):
            group_sums, x_sum = group
            for row in range(rows):
                at = g * group_size + i * rows + row
                parts = _halves(row_of(values, index * len(x) + at))
                group_sums = tuple(
                    total + x[at] * part.astype(x.dtype) for total, part in zip(group_sums, parts, strict=True)
                )
                x_sum += x[at]
            return group_sums, x_sum

        group_sums, x_sum = jax.lax.fori_loop(0, group_size // rows, add_rows, (nothing, jnp.zeros_like(x[0])))
        scale = row_of(scales, index * num_scales + g * num_scales // num_groups).astype(x.dtype)
        if steps is not None and zeros is not None:
            scale *= row_of(steps, index * num_groups + g).astype(x.dtype)
            # The sum of 16 x values - zero is that of the values, less the zero for each row.
            zero = x_sum * row_of(zeros, index * num_groups + g).astype(x.dtype)
            group_sums = tuple(ZERO_STEPS * part - zero[:, i] for i, part in enumerate(group_sums))
        return tuple(total + part * scale[:, i] for i, (total, part) in enumerate(zip(sums, group_sums, strict=True)))

    return jnp.stack(jax.lax.fori_loop(0, num_groups, add_group, nothing), axis=-1)


def _halves(row: Integer[Array, "width"]) -> tuple[Integer[Array, "width"], ...]:
    """int8 values; of packed ones the low and the high halves of each byte."""
    if row.dtype != jnp.uint8:
        return (row,)
    return (row << 4).astype(jnp.int8) >> 4, row.astype(jnp.int8) >> 4
