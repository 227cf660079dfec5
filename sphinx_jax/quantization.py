"""Weight-only quantization of the model: which parameters are quantized, and their shardings.

The matrices of attention, of experts and of the output head are quantized: 46.4 of SPHINX-MoE's 50 billion parameters.
The embedding, the norms, the router and the vision encoders are not.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sharding import shardings_of
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import Quantized, QuantizedDtype, Weight, quantize

Path = tuple[str | int, ...]

CONTRACTION_AXES: dict[str | int, int] = {"wqkv": -4, "wo": -2, "w_in": -3, "w_out": -2, "kernel": -2}
"""The contraction dimension of each quantized parameter, as a negative index. `kernel` is the output head's."""


def is_quantized(path: Path) -> bool:
    """Whether the parameter at `path` of the model is quantized."""
    return path[0] == "language" and path[-1] in CONTRACTION_AXES


def dtype_of(path: Path, kind: QuantizedDtype) -> QuantizedDtype:
    """What the parameter at `path` becomes in a model quantized to `kind`.

    The output head is always int8: no layer after it averages its errors, and it is 0.3 % of SPHINX-MoE.
    """
    return "int8" if path[-1] == "kernel" else kind


def quantized_dtype(params: Any) -> QuantizedDtype | None:
    """What a model is quantized to, from a tree of its parameters or of their shapes; None: it is not."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    found = {leaf.dtype for leaf in leaves if isinstance(leaf, Quantized)}
    # The head of an int4 model is int8.
    return "int4" if "int4" in found else "int8" if found else None


def has_quantized(params: Any) -> bool:
    """Whether a tree of parameters, or of their shapes, has quantized ones."""
    return quantized_dtype(params) is not None


def abstract_quantized(path: Path, leaf: jax.ShapeDtypeStruct | jax.Array, kind: QuantizedDtype) -> Quantized:
    """Shapes and shardings of a quantized parameter: each device has the steps and zeros of its shard of the values.

    Raises UserError if a shard boundary falls inside a group of values with one step, or inside a byte.
    """
    axis, kind = CONTRACTION_AXES[path[-1]], dtype_of(path, kind)
    position = len(leaf.shape) + axis
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)  # abstract_params makes no other
    local_outputs = sharding.shard_shape(leaf.shape)[-1]
    if local_outputs % 2 and kind == "int4":
        raise UserError(
            f"int4 packs two outputs in a byte, and the mesh leaves {local_outputs} of {path[-1]}'s {leaf.shape[-1]} "
            "outputs to a device: use a smaller mesh, or int8"
        )
    shapes = jax.eval_shape(lambda w: quantize(w, kind, axis), leaf)
    num_shards = leaf.shape[position] // sharding.shard_shape(leaf.shape)[position]
    if kind == "int4" and shapes.num_groups % num_shards:
        raise UserError(
            f"int4 rounds {leaf.shape[position] // shapes.num_groups} of {path[-1]}'s {leaf.shape[position]} values "
            f"together, which the mesh would split into {num_shards} shards: use a smaller mesh, or int8"
        )
    spec = [*sharding.spec, *[None] * len(leaf.shape)][: len(leaf.shape)]
    # Each shard has a number that is the same for the whole dimension.
    of_output = [None if i == position else axes for i, axes in enumerate(spec)]

    def abstract(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        partition = PartitionSpec(*(of_output if array.shape[position] == 1 else spec))
        placed = NamedSharding(sharding.mesh, partition, memory_kind=sharding.memory_kind)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed)

    return jax.tree.map(abstract, shapes)


def quantized(path: Path, leaf: Weight, kind: QuantizedDtype | None) -> Weight:
    """The parameter at `path` of the model, quantized if `is_quantized`; as it is if `kind` is None, or it is so
    already.
    """
    if kind is None or isinstance(leaf, Quantized) or not is_quantized(path):
        return leaf
    target = abstract_quantized(path, leaf, kind)
    return _program(target.dtype, target.axis, shardings_of(target))(leaf)


@functools.lru_cache(maxsize=64)
def _program(kind: QuantizedDtype, axis: int, shardings: Quantized) -> Callable[[jax.Array], Quantized]:
    """The jitted quantization of one shape and sharding; `shardings` has shardings in place of its arrays."""

    def function(weights: jax.Array) -> Quantized:
        if weights.ndim == -axis or shardings.values.shard_shape(weights.shape)[0] < len(weights):
            return quantize(weights, kind, axis)
        # Matrix by matrix where each device has all of a stack: int4's search takes five times the bytes it rounds.
        return jax.lax.map(lambda matrices: quantize(matrices, kind, axis), weights)

    return jax.jit(function, out_shardings=shardings)


def abstract_quantized_params(params: Any, kind: QuantizedDtype) -> Any:
    """The abstract parameters of a model after `quantized`."""

    def leaf(keys: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        path = tuple(key.key for key in keys)
        return abstract_quantized(path, leaf, kind) if is_quantized(path) else leaf

    return jax.tree_util.tree_map_with_path(leaf, params)
