"""Weights of few bits: small integers, and a scale for each run of them along the dimension that is summed over.

Products take the weights as numbers again where they are multiplied: an elementwise function of what is read, which
XLA joins to the product that reads it, so that memory is asked for the small integers alone.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

Kind = Literal["int8", "int4"]

GROUP = {"int8": None, "int4": 64}
"""Numbers that share a scale; None: all that are summed into one output. 16 levels are too few for a whole column."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """values x scales, each scale serving a run of values along `axis`, which counts from the last dimension.

    Stands where an array of weights stands: it has its shape, and `astype` makes it one. Integers of four bits lie two
    in a byte (jax cannot hand arrays of its own int4 to programs compiled ahead): the low ones are the first half of a
    run, the high ones the second.
    """

    values: Int8[Array, "*shape"] | UInt8[Array, "*halved"]
    scales: Float[Array, "*groups"]
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.values.shape)
        shape[self.axis] *= 2 if self.values.dtype == jnp.uint8 else 1
        return tuple(shape)

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """That of the values."""
        return self.values.sharding

    def __getitem__(self, index: Any) -> "Quantized":
        """Itself for `...`, as Flax asks a parameter for its value."""
        if index is not ...:
            raise IndexError(f"a quantized array is read whole, with [...], not with [{index}]")
        return self

    def astype(self, dtype: jnp.dtype) -> Float[Array, "*shape"]:
        """The weights as numbers of `dtype`."""
        shape, axis = self.shape, self.values.ndim + self.axis
        values = _split(self.values, axis, self.scales.shape[axis])
        if values.dtype == jnp.uint8:
            halves = jnp.stack([values & 15, values >> 4], axis=axis + 1)
            values = halves.astype(jnp.int8) - 8
            values = values.reshape(*shape[:axis], self.scales.shape[axis], -1, *shape[axis + 1 :])
        wide = values.astype(jnp.float32) * jnp.expand_dims(self.scales, axis + 1).astype(jnp.float32)
        return wide.reshape(shape).astype(dtype)


Weight = Array | Quantized


def quantize(weights: Float[Array, "*shape"], kind: Kind, axis: int) -> Quantized:
    """Each number rounded to the nearest multiple of its run's scale, the largest to the largest integer.

    `axis`, negative, is the dimension that products sum over. Scales are bfloat16, and rounding allows for it.
    """
    position, largest = weights.ndim + axis, {"int8": 127, "int4": 7}[kind]
    size = weights.shape[position]
    runs = _split(weights.astype(jnp.float32), position, size // math.gcd(size, GROUP[kind] or size))
    scales = (jnp.max(jnp.abs(runs), axis=position + 1, keepdims=True) / largest).astype(jnp.bfloat16)
    # Where all are zero any scale does.
    steps = jnp.round(runs / jnp.where(scales == 0, 1, scales).astype(jnp.float32))
    values = jnp.clip(steps, -largest, largest).astype(jnp.int8)
    if kind == "int4":
        low, high = jnp.split((values + 8).astype(jnp.uint8), 2, axis=position + 1)
        values = low | high << 4
    values = values.reshape(*weights.shape[:position], -1, *weights.shape[position + 1 :])
    return Quantized(values, scales.squeeze(position + 1), axis)


def _split(x: Array, axis: int, count: int) -> Array:
    """`x` with `axis` as two: `count`, and what is left."""
    return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
