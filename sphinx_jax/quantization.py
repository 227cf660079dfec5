"""Which weights of the model are kept in few bits, and laying them out over a mesh.

All that the decoder multiplies word by word, the experts above all: 46.3 of SPHINX-MoE's 50 billion parameters. The
embedding, the head, the norms, the router and the encoders stay as they are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import Kind, Quantized, quantize

Path = tuple[str | int, ...]

SUMMED_OVER = {"wqkv": -4, "wo": -2, "w_in": -3, "w_out": -2}
"""Of each quantized parameter the dimension that products sum over, counted from the last."""


def is_quantized(path: Path) -> bool:
    """Whether the parameter at `path` of the model is one of those."""
    return path[0] == "language" and path[-1] in SUMMED_OVER


def abstract_quantized(path: Path, leaf: jax.ShapeDtypeStruct, kind: Kind) -> Quantized:
    """Shapes and shardings of a quantized parameter: each device has the scales of its own values.

    Raises UserError if the mesh cuts through a run of values that share a scale.
    """
    axis = SUMMED_OVER[path[-1]]
    shapes = jax.eval_shape(lambda w: quantize(w, kind, axis), leaf)
    position = len(leaf.shape) + axis
    groups, local = shapes.scales.shape[position], leaf.sharding.shard_shape(leaf.shape)
    parts = leaf.shape[position] // local[position]
    if groups % parts and kind == "int4":
        raise UserError(
            f"int4 keeps a scale for every {leaf.shape[position] // groups} of {path[-1]}'s {leaf.shape[position]} "
            f"numbers, and the mesh would cut them into {parts} parts: use a mesh of fewer parts, or int8"
        )
    mesh, names = leaf.sharding.mesh, [*leaf.sharding.spec, *[None] * len(leaf.shape)][: len(leaf.shape)]
    if groups == 1:
        names[position] = None
    place = lambda part, spec: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=spec)
    scales = NamedSharding(mesh, PartitionSpec(*names), memory_kind=leaf.sharding.memory_kind)
    return Quantized(place(shapes.values, leaf.sharding), place(shapes.scales, scales), axis)


def quantized(path: Path, leaf: jax.Array, kind: Kind) -> Quantized | jax.Array:
    """A parameter of the model, quantized if it is one of those."""
    if not is_quantized(path):
        return leaf
    target = abstract_quantized(path, leaf, kind)
    return _program(kind, target.axis, target.values.sharding, target.scales.sharding)(leaf)


@functools.lru_cache(maxsize=64)
def _program(kind: Kind, axis: int, values: NamedSharding, scales: NamedSharding) -> Callable[[jax.Array], Quantized]:
    return jax.jit(lambda weights: quantize(weights, kind, axis), out_shardings=Quantized(values, scales, axis))


def abstract_quantized_params(params: Any, kind: Kind) -> Any:
    """The same for all of a model's abstract parameters."""

    def leaf(keys: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        path = tuple(key.key for key in keys)
        return abstract_quantized(path, leaf, kind) if is_quantized(path) else leaf

    return jax.tree_util.tree_map_with_path(leaf, params)
