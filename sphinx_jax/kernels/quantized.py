"""Weight-only quantization: int8 or int4 values, and one scale per group along the contracted dimension.

Weights are dequantized where they are multiplied. That is elementwise, and XLA fuses it into the product that reads
the weights, so only the integers and the scales are read from memory.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

QuantizedDtype = Literal["int8", "int4"]

GROUP_SIZE = {"int8": None, "int4": 64}
"""Values that share a scale; None: the whole contracted dimension. 16 levels are too few for a whole column."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """values x scales; each scale belongs to a group of values along `axis`, a negative dimension index.

    A drop-in for an array of weights: it has the array's `shape`, and `astype` dequantizes. Two int4 values share a
    byte, as jax cannot pass arrays of its own int4 type to programs compiled ahead of time: the low four bits hold the
    first half of a group, the high four bits the second half.
    """

    # Of arrays: int8[*shape] or packed uint8[*packed_shape], and float[*group_shape]. Not checked at run time: trees of
    # shapes, shardings or specs are instances of this class as well.
    values: Any
    scales: Any
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dequantized weights."""
        shape = list(self.values.shape)
        shape[self.axis] *= 2 if self.values.dtype == jnp.uint8 else 1
        return tuple(shape)

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Of the values."""
        return self.values.sharding

    def __getitem__(self, index: Any) -> "Quantized":
        """Itself for `...`, the index with which Flax reads a parameter."""
        if index is not ...:
            raise IndexError(f"a quantized array can be indexed with [...] only, not with [{index}]")
        return self

    def astype(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The dequantized weights."""
        shape, axis = self.shape, self.values.ndim + self.axis
        values = _split_groups(self.values, axis, self.scales.shape[axis])
        if values.dtype == jnp.uint8:
            halves = jnp.stack([values & 15, values >> 4], axis=axis + 1)
            values = halves.astype(jnp.int8) - 8
            values = values.reshape(*shape[:axis], self.scales.shape[axis], -1, *shape[axis + 1 :])
        weights = values.astype(jnp.float32) * jnp.expand_dims(self.scales, axis + 1).astype(jnp.float32)
        return weights.reshape(shape).astype(dtype)


Weight = Array | Quantized


def quantize(weights: Float[Array, "..."], dtype: QuantizedDtype, axis: int) -> Quantized:
    """Round each weight to the nearest multiple of its group's scale; the largest gets the largest integer.

    `axis`, negative, is the contracted dimension. Scales are rounded to bfloat16 first, and the integers allow for it.
    """
    position, max_value = weights.ndim + axis, {"int8": 127, "int4": 7}[dtype]
    size = weights.shape[position]
    groups = _split_groups(weights.astype(jnp.float32), position, size // math.gcd(size, GROUP_SIZE[dtype] or size))
    scales = (jnp.max(jnp.abs(groups), axis=position + 1, keepdims=True) / max_value).astype(jnp.bfloat16)
    # A group of zeros has scale 0; any divisor gives zeros.
    steps = jnp.round(groups / jnp.where(scales == 0, 1, scales).astype(jnp.float32))
    values = jnp.clip(steps, -max_value, max_value).astype(jnp.int8)
    if dtype == "int4":
        low, high = jnp.split((values + 8).astype(jnp.uint8), 2, axis=position + 1)
        values = low | high << 4
    values = values.reshape(*weights.shape[:position], -1, *weights.shape[position + 1 :])
    return Quantized(values, scales.squeeze(position + 1), axis)


def _split_groups(x: Array, axis: int, num_groups: int) -> Array:
    """`x` with dimension `axis` split in two: groups, and the values of a group."""
    return x.reshape(*x.shape[:axis], num_groups, -1, *x.shape[axis + 1 :])
