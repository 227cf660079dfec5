"""A frozen base for training adapters: quantized while it is read, one layer at a time, its layers stacked.

Training scans over stacked layers. A stacked matrix of all layers is most of the model: read whole, it would need the
memory that quantization saves, on the host and on the devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sharding import shardings_of
from sphinx_jax.checkpoints import reader
from sphinx_jax.checkpoints.loaded_model import Loaded, Params, abstract_model
from sphinx_jax.checkpoints.reader import ParamPath, array_path, is_param
from sphinx_jax.checkpoints.source import CheckpointSource
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import QuantizedDtype, Weight
from sphinx_jax.quantization import quantized


def load_quantized(source: CheckpointSource, mesh: Mesh, dtype: str, kind: QuantizedDtype) -> Loaded:
    """The checkpoint's model with stacked layers: its matrices quantized to `kind`, the rest in `dtype`.

    Each device holds the result and one unquantized matrix of one layer. Raises UserError as `reader.load` does, and
    if the checkpoint is stored quantized.
    """
    if source.quantized:
        raise UserError(
            f"{source.path} is stored quantized to {source.quantized}: give --init the checkpoint that it was "
            f"converted from, with --quantize {kind}"
        )
    graph, abstract = abstract_model(source.config, mesh, dtype, unstacked=False, quantized=kind)
    leaves: list[tuple[Any, Any]] = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=is_param)
    targets: dict[ParamPath, Any] = {array_path(keys): target for keys, target in leaves}
    params: dict[ParamPath, Weight] = {}

    def stack(path: ParamPath, param: Weight) -> None:
        param = quantized(path, param, kind)
        index = next((key for key in path if isinstance(key, int) and path[0] == "language"), None)
        if index is None:
            params[path] = param
            return
        stacked_path = tuple(key for key in path if key != index)
        target = targets[stacked_path]
        stacked = params.pop(stacked_path, None)
        if stacked is None:
            stacked = _zeros(target)
        params[stacked_path] = _write_layer(shardings_of(target))(stacked, param, index)

    loaded = reader.load(source, mesh, dtype, unstacked=True, transform=stack)
    by_path: Params = jax.tree_util.tree_map_with_path(
        lambda keys, _: params[array_path(keys)], abstract, is_leaf=is_param
    )
    return dataclasses.replace(loaded, graph=graph, params=by_path)


def _zeros(target: Any) -> Any:
    """An array or Quantized of zeros with the shapes and shardings of `target`."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), target)


@functools.lru_cache(maxsize=64)
def _write_layer(shardings: Any) -> Callable[[Weight, Weight, int], Weight]:
    """(stack, layer, index) -> the stack with the layer written in place: the stack is donated."""

    def write(stack: Weight, layer: Weight, index: jax.Array) -> Weight:
        return jax.tree.map(
            lambda array, new: jax.lax.dynamic_update_index_in_dim(array, new.astype(array.dtype), index, 0),
            stack,
            layer,
        )

    return jax.jit(write, donate_argnums=0, out_shardings=shardings)
