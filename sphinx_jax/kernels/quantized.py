"""Weight-only quantization: int8 values with one scale for each output, int4 values in groups of 32 along the
contracted dimension, with a step and a zero point for each group (`int4_rounding`).

Weights are dequantized where they are multiplied. `quantized_matmul` has the products that read only the quantized
arrays from memory; any other user of `astype` writes a dequantized matrix, unless XLA fuses it into its consumer.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Integer, UInt8

from sphinx_jax.kernels.int4_rounding import ZERO_STEPS, round_to_int4

QuantizedDtype = Literal["int8", "int4"]

GROUP_SIZE = {"int8": None, "int4": 32}
"""Values with a step and a zero point of their own; None: there are none, and the scale is that of the whole contracted
dimension. 16 levels are too few for a whole column."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """int8: scales x values. int4: scales x steps x (16 x values - zeros).

    Scales, steps and zeros belong to groups of values along `axis`, a negative dimension index: steps and zeros to
    GROUP_SIZE neighbours, scales to all (or, once dimensions were merged, to several groups).

    A drop-in for an array of weights: it has the array's `shape`, and `astype` dequantizes. int4 values are integers in
    [-8, 7] in two's complement. As jax cannot pass arrays of its own int4 type to programs compiled ahead of time, a
    byte holds two neighbours along the last dimension, the outputs of a product: the first in the low four bits.
    """

    # Of arrays: int8[*shape] or packed uint8[*packed_shape], bfloat16[*scales_shape], and of int4 twice
    # int8[*group_shape]. Not checked at run time: trees of shapes, shardings or specs are instances of this class as
    # well.
    values: Any
    scales: Any
    axis: int = dataclasses.field(metadata={"static": True})
    steps: Any = None
    zeros: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dequantized weights."""
        shape = list(self.values.shape)
        shape[-1] *= 2 if self.values.dtype == jnp.uint8 else 1
        return tuple(shape)

    @property
    def num_groups(self) -> int:
        """Groups of values of each output."""
        return (self.scales if self.steps is None else self.steps).shape[self.axis]

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
        flat = jax.tree.map(lambda array: array.reshape(*array.shape[:end], -1), self)
        return dataclasses.replace(flat, axis=-2)

    def astype(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The dequantized weights: exact in float32, or rounded once."""
        values = _unpack(self.values).astype(jnp.float32)
        if self.steps is not None:
            values = self._by_group(jnp.subtract, ZERO_STEPS * values, self.zeros)
            values = self._by_group(jnp.multiply, values, self.steps)
        return self._by_group(jnp.multiply, values, self.scales).astype(dtype)

    def _by_group(self, function: Callable[[Array, Array], Array], x: Array, of_groups: Array) -> Array:
        """function(x, the number of its group), for each element of `x`."""
        axis = x.ndim + self.axis
        groups = _split_groups(x, axis, of_groups.shape[axis])
        return function(groups, jnp.expand_dims(of_groups, axis + 1).astype(x.dtype)).reshape(x.shape)


Weight = Array | Quantized


def quantize(weights: Float[Array, "..."], dtype: QuantizedDtype, axis: int) -> Quantized:
    """Round weights to integers; `axis`, negative, is the contracted dimension.

    Raises ValueError if the last dimension cannot be packed: int4 needs an even one.
    """
    if dtype == "int4" and weights.shape[-1] % 2:
        raise ValueError(f"int4 packs two outputs in a byte; {weights.shape[-1]} outputs are odd")
    position, weights = weights.ndim + axis, weights.astype(jnp.float32)
    if dtype == "int8":
        return Quantized(*_round_to_int8(weights, position), axis)
    size = weights.shape[position]
    rounded = round_to_int4(_split_groups(weights, position, size // math.gcd(size, GROUP_SIZE[dtype])), position + 1)
    scales, steps, zeros = (array.squeeze(position + 1) for array in rounded[1:])
    return Quantized(_pack(rounded.values.reshape(weights.shape)), scales, axis, steps, zeros)


def _round_to_int8(weights: Float[Array, "..."], axis: int) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Integers, and bfloat16 scales of size 1 along `axis`.

    Each weight becomes the nearest multiple of its output's scale; the largest gets 127. Scales are rounded to bfloat16
    first, and the integers allow for it.
    """
    scales = (jnp.max(jnp.abs(weights), axis=axis, keepdims=True) / 127).astype(jnp.bfloat16)
    # An output whose weights are zeros has scale 0; any divisor gives zeros.
    values = jnp.round(weights / jnp.where(scales == 0, 1, scales).astype(jnp.float32))
    return jnp.clip(values, -127, 127).astype(jnp.int8), scales


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
