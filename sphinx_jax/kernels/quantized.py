"""Weight-only quantization: int8 or int4 values, and one scale per group along the contracted dimension.

Weights are dequantized where they are multiplied. `quantized_matmul` has the products that read only the integers and
the scales from memory; any other user of `astype` writes a dequantized matrix, unless XLA fuses it into its consumer.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Integer, UInt8

QuantizedDtype = Literal["int8", "int4"]

GROUP_SIZE = {"int8": None, "int4": 64}
"""Values that share a scale; None: the whole contracted dimension. 16 levels are too few for a whole column."""

_LAYOUT = {"int8": 1, "int4": 1}
"""Numbers of the layouts of `Quantized`. A checkpoint records its layout: one that changes gets a new number."""


def layout(dtype: QuantizedDtype) -> dict[str, int | None]:
    """What a checkpoint with quantized weights says of their layout."""
    return {"group_size": GROUP_SIZE[dtype], "layout": _LAYOUT[dtype]}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """values x scales; each scale belongs to a group of values along `axis`, a negative dimension index.

    A drop-in for an array of weights: it has the array's `shape`, and `astype` dequantizes. int4 values are integers in
    [-8, 7] in two's complement. As jax cannot pass arrays of its own int4 type to programs compiled ahead of time, a
    byte holds two neighbours along the last dimension, the outputs of a product: the first in the low four bits.
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
        shape[-1] *= 2 if self.values.dtype == jnp.uint8 else 1
        return tuple(shape)

    @property
    def num_groups(self) -> int:
        """Scales of each output."""
        return self.scales.shape[self.axis]

    @property
    def dtype(self) -> QuantizedDtype:
        """What the weights are rounded to."""
        return "int4" if self.values.dtype == jnp.uint8 else "int8"

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Of the values."""
        return self.values.sharding

    def __getitem__(self, index: Any) -> "Quantized":
        """Itself for `...`, the index with which Flax reads a parameter."""
        if index is not ...:
            raise IndexError(f"a quantized array can be indexed with [...] only, not with [{index}]")
        return self

    def with_flat_outputs(self) -> "Quantized":
        """Itself with all dimensions after the contracted one as one."""
        end = self.values.ndim + self.axis + 1
        values, scales = (array.reshape(*array.shape[:end], -1) for array in (self.values, self.scales))
        return Quantized(values, scales, -2)

    def astype(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The dequantized weights."""
        axis = self.values.ndim + self.axis
        # bfloat16 holds all integers and scales: the product in bfloat16 is the exact one rounded once.
        wide = jnp.promote_types(dtype, self.scales.dtype)
        groups = _split_groups(_unpack(self.values).astype(wide), axis, self.num_groups)
        return (groups * jnp.expand_dims(self.scales.astype(wide), axis + 1)).reshape(self.shape).astype(dtype)


Weight = Array | Quantized


def quantize(weights: Float[Array, "..."], dtype: QuantizedDtype, axis: int) -> Quantized:
    """Round weights to integers times one scale per group; `axis`, negative, is the contracted dimension.

    Raises ValueError if the last dimension cannot be packed: int4 needs an even one.
    """
    if dtype == "int4" and weights.shape[-1] % 2:
        raise ValueError(f"int4 packs two outputs in a byte; {weights.shape[-1]} outputs are odd")
    position = weights.ndim + axis
    size = weights.shape[position]
    groups = _split_groups(weights.astype(jnp.float32), position, size // math.gcd(size, GROUP_SIZE[dtype] or size))
    values, scales = _round_to_nearest(groups, position + 1, {"int8": 127, "int4": 7}[dtype])
    values = values.reshape(weights.shape)
    return Quantized(_pack(values) if dtype == "int4" else values, scales.squeeze(position + 1), axis)


def _round_to_nearest(
    groups: Float[Array, "..."], axis: int, max_value: int
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Integers, and bfloat16 scales of size 1 along `axis`, the dimension of a group's values.

    Each weight becomes the nearest multiple of its group's scale; the largest gets the largest integer. Scales are
    rounded to bfloat16 first, and the integers allow for it.
    """
    scales = (jnp.max(jnp.abs(groups), axis=axis, keepdims=True) / max_value).astype(jnp.bfloat16)
    # A group of zeros has scale 0; any divisor gives zeros.
    steps = jnp.round(groups / jnp.where(scales == 0, 1, scales).astype(jnp.float32))
    return jnp.clip(steps, -max_value, max_value).astype(jnp.int8), scales


def _pack(values: Int8[Array, "*rows out"]) -> UInt8[Array, "*rows out/2"]:
    """Pairs of int4 values along the last dimension in a byte, the first in the low four bits."""
    low, high = (values[..., i::2].astype(jnp.uint8) for i in range(2))
    return low & 15 | high << 4


def _unpack(values: Integer[Array, "*rows width"]) -> Int8[Array, "*rows out"]:
    """int8 values as they are; packed ones as int8, elementwise, so that XLA fuses it into an elementwise consumer."""
    if values.dtype != jnp.uint8:
        return values
    halves = (values[..., None] << jnp.array([4, 0], jnp.uint8)).astype(jnp.int8) >> 4
    return halves.reshape(*values.shape[:-1], -1)


def _split_groups(x: Array, axis: int, num_groups: int) -> Array:
    """`x` with dimension `axis` split in two: groups, and the values of a group."""
    return x.reshape(*x.shape[:axis], num_groups, -1, *x.shape[axis + 1 :])
