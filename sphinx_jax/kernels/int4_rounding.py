"""Rounding to int4 by search: for each group of values the step and the zero point of the least squared error.

weight = scale x step x (16 value - zero): a bfloat16 scale for each output, an 8-bit step and an 8-bit zero point, in
sixteenths of a step, for each group, and values in [-8, 7]. The error hardly depends on the bits of steps, which are in
[0, 127] as GPUs' products take signed integers only; a zero point lets sixteen values span a group from its least to
its largest weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

ZERO_STEPS = 16
"""Zero points are multiples of a step divided by this."""

_WIDTHS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Widths to try of the sixteen values' span, of a group's: outliers are clipped if the others gain more."""

_FITS = 2
"""Least-squares fits for each width. Error on Gaussian weights, llama.cpp's Q4_K 0.0718: one 0.0719, two 0.0712, three
0.0705."""


class Int4(NamedTuple):
    """Rounded groups; `scales` have size 1 along the groups and along a group's values, steps and zeros along the
    latter.
    """

    values: Int8[Array, "..."]
    scales: Float[Array, "..."]
    steps: Int8[Array, "..."]
    zeros: Int8[Array, "..."]


def round_to_int4(groups: Float[Array, "..."], axis: int) -> Int4:
    """Round float32 `groups`, with a group's values along `axis` and the groups of an output along `axis - 1`."""
    step, offset = _search(groups, axis)
    scales = (jnp.max(step, axis - 1, keepdims=True) / 127).astype(jnp.bfloat16)
    scale = scales.astype(jnp.float32)
    steps = jnp.clip(jnp.round(step / _or_one(scale)), jnp.minimum(1, jnp.ceil(step)), 127)
    # The offset that fits best once the step is rounded.
    rounded = _or_one(steps * scale)
    values = _nearest(groups, rounded, offset)
    offset = jnp.mean(groups - rounded * values, axis, keepdims=True)
    zeros = jnp.clip(jnp.round(-ZERO_STEPS * offset / rounded), -128, 127)
    values = _nearest(groups, rounded, -zeros / ZERO_STEPS * rounded)
    return Int4(
        values.astype(jnp.int8),
        (scale / ZERO_STEPS).astype(jnp.bfloat16),
        steps.astype(jnp.int8),
        zeros.astype(jnp.int8),
    )


def _search(groups: Float[Array, "..."], axis: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The step and the offset of each group, weight = step x value + offset, with the least squared error found.

    Each width gives values, these the step and the offset that fit them best, and these new values. The loop holds one
    number of a kind for each group.
    """
    # With zero in the span, the zero point of any group is within its 8 bits.
    low = jnp.minimum(jnp.min(groups, axis, keepdims=True), 0)
    high = jnp.maximum(jnp.max(groups, axis, keepdims=True), 0)

    def attempt(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step = (high - low) / 15 * jnp.asarray(_WIDTHS)[i]
        offset = (low + high + step) / 2
        for _ in range(_FITS):
            step, offset = _least_squares(groups, _nearest(groups, _or_one(step), offset), step, axis)
        fitted = step * _nearest(groups, _or_one(step), offset) + offset
        error = jnp.sum((fitted - groups) ** 2, axis, keepdims=True)
        is_better = error < best[0]
        return jnp.minimum(error, best[0]), jnp.where(is_better, step, best[1]), jnp.where(is_better, offset, best[2])

    start = (jnp.full_like(low, jnp.inf), jnp.zeros_like(low), jnp.zeros_like(low))
    _, step, offset = jax.lax.fori_loop(0, len(_WIDTHS), attempt, start)
    return step, offset


def _least_squares(
    groups: Float[Array, "..."], values: Float[Array, "..."], step: Float[Array, "..."], axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The step and the offset, within 8 steps, for which step x values + offset is nearest to the groups; `step` as it
    is if all values are equal.
    """
    # Sums of products rather than of differences from a mean, which XLA would write to memory.
    mean, mean_value, mean_square, mean_product = (
        jnp.mean(x, axis, keepdims=True) for x in (groups, values, values * values, values * groups)
    )
    variance = mean_square - mean_value**2
    fitted = (mean_product - mean_value * mean) / _or_one(variance)
    step = jnp.where((variance > 0) & (fitted > 0), fitted, step)
    return step, jnp.clip(mean - step * mean_value, -8 * step, 8 * step)


def _nearest(groups: Float[Array, "..."], step: Float[Array, "..."], offset: Float[Array, "..."]) -> Array:
    """The values in [-8, 7] whose weights are nearest to the groups."""
    return jnp.clip(jnp.round((groups - offset) / step), -8, 7)


def _or_one(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` as a divisor: groups of zeros have step 0."""
    return jnp.where(x == 0, 1, x)
