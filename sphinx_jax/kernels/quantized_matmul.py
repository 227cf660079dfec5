"""Products that read the integers of quantized matrices; the only code besides `quantized` that knows their layout.

A dequantized matrix takes two to eight times the bytes of the integers. Where a product is limited by reading the
matrix, with few rows, it should not be written to memory:

- On a GPU, with one row XLA fuses the conversion into its sum over the matrix. With more, its Triton products convert
  integers themselves, in programs with `sharding.Program.fused_operands`: one scale per output is applied to the
  result, scales and steps of groups to the integers (`_fused_product`).
- On a CPU, `quantized_matvec` sums the matrix's rows in a loop that converts them.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Int8, Integer, Shaped

import sharding
from sphinx_jax.kernels.int4_rounding import ZERO_STEPS
from sphinx_jax.kernels.quantized import Quantized
from sphinx_jax.kernels.single_cpu_kernel import single_cpu_kernel

Product = Callable[[Array, Array], Array]
"""Of inputs and weights, as `jnp.dot`."""

ROWS_PER_STEP = 8
"""Rows of the matrix that one step of the loop on a CPU adds: the sum is loaded and stored once for all of them."""


def fuses_dequantization(w: Quantized) -> bool:
    """Whether `quantized_product` in the program that is being traced reads the integers of `w`, for any rows."""
    return sharding.fuses_operands() if _has_scale_per_output(w) else sharding.fuses_groups()


def quantized_product(product: Product, x: Float[Array, "*rows in"], w: Quantized) -> Float[Array, "*rows out"]:
    """product(x, weights) in the dtype of `x`, with the outputs as one last dimension of weights and result."""
    w = w.with_flat_outputs()
    if _has_scale_per_output(w):
        return (product(x, w.values.astype(x.dtype)).astype(jnp.float32) * w.scales.astype(jnp.float32)).astype(x.dtype)
    return _fused_product(product, x, w) if fuses_dequantization(w) else product(x, w.astype(x.dtype))


def _has_scale_per_output(w: Quantized) -> bool:
    return w.num_groups == 1 and w.steps is None


def _fused_product(product: Product, x: Float[Array, "*rows in"], w: Quantized) -> Float[Array, "*rows out"]:
    """The same in operations that XLA:GPU fuses into Triton products: conversions, and factors of groups.

    It does not fuse numbers that are subtracted (jax 0.12): a second product multiplies the zero points by the sum of
    each group's inputs. Factors in float32 are not fused either (0.12), and a sum in float32 writes twice the bytes.
    """
    values = w.values
    if w.dtype == "int4":
        values = jax.lax.bitcast_convert_type(values, jnp.int4).reshape(w.shape)
    scale_per_output = w.scales.shape[-2] == 1
    factors = [factor for factor in (w.steps, None if scale_per_output else w.scales) if factor is not None]
    y = product(x, _scaled(values, x.dtype, factors))
    if w.zeros is not None:
        sums = jnp.sum(x.reshape(*x.shape[:-1], w.num_groups, -1), axis=-1, dtype=jnp.float32)
        # One sum of two products takes one all-reduce, where the inputs are sharded. Powers of two are exact.
        y = ZERO_STEPS * (y + product((sums / -ZERO_STEPS).astype(x.dtype), _scaled(w.zeros, x.dtype, factors)))
    return (y.astype(jnp.float32) * w.scales.astype(jnp.float32)).astype(x.dtype) if scale_per_output else y


def _scaled(
    values: Integer[Array, "*experts in out"], dtype: DTypeLike, factors: Sequence[Shaped[Array, "*experts _ out"]]
) -> Float[Array, "*experts in out"]:
    """values x factors; each number of a factor belongs to neighbours along the contracted dimension."""
    product = values.astype(dtype)
    for factor in factors:
        # Without the constraint, a loop of decode steps is given a transposed copy of all factors.
        factor = with_layout_constraint(factor, Layout(tuple(range(factor.ndim))))
        product *= jnp.repeat(factor, values.shape[-2] // factor.shape[-2], axis=-2).astype(dtype)
    return product


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
    steps: Int8[Array, "n_groups width packed"] | None,
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
