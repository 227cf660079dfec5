"""Where the parameters of an offloaded model are: each expert an array of its own in host memory, all else on the
devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from sharding import named_sharding, shardings_of
from sphinx_jax.config import DecoderConfig
from sphinx_jax.kernels.linear import gathered_matrix
from sphinx_jax.kernels.quantized import Quantized, QuantizedDtype, Weight
from sphinx_jax.language.decoder import DecoderLayer
from sphinx_jax.language.moe import SINGLE_EXPERT
from sphinx_jax.quantization import Path, abstract_quantized, is_quantized, quantized

MARKERS = ("start", "end")
"""Parameters next to the vision encoders that the decoder's input needs."""


def offloaded(path: Path, param: Weight, quantize: QuantizedDtype | None = None) -> Any:
    """The parameter at `path` of the model, quantized if that is wanted; of a layer's experts a list of all of them in
    host memory.
    """
    if not _is_experts(path):
        return quantized(path, param, quantize)
    sharding: Any = _expert_sharding(path, param)
    if isinstance(param, Quantized):
        expert = jax.ShapeDtypeStruct(param.shape[1:], np.float32, sharding=sharding)
        sharding = shardings_of(abstract_quantized(path, expert, param.dtype))
    take = _expert_slice(sharding)
    return [to_host(quantized(path, take(param, np.int32(i)), quantize)) for i in range(param.shape[0])]


def abstract_offloaded(params: Any, quantize: QuantizedDtype | None = None) -> Any:
    """The abstract parameters of a model after `offloaded`."""

    def leaf(keys: tuple, param: jax.ShapeDtypeStruct) -> Any:
        path = tuple(key.key for key in keys)
        if not _is_experts(path):
            return abstract_quantized(path, param, quantize) if quantize and is_quantized(path) else param
        expert: Any = jax.ShapeDtypeStruct(param.shape[1:], param.dtype, sharding=_expert_sharding(path, param))
        expert = abstract_quantized(path, expert, quantize) if quantize else expert
        return [jax.tree.map(functools.partial(_abstract, memory_kind="pinned_host"), expert)] * param.shape[0]

    return jax.tree_util.tree_map_with_path(leaf, params)


def to_host(tree: Any) -> Any:
    """A tree of arrays in pinned host memory."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host")), tree)


def split_experts(params: dict) -> tuple[dict, list[dict], list[list[dict]]]:
    """The parameters outside of the layers; those of each layer without its experts; and each layer's experts."""
    language = params["language"]
    layers = [language["layers"][i] for i in range(len(language["layers"]))]
    without_experts = [layer | {"ffn": {"router": layer["ffn"]["router"]}} for layer in layers]
    experts = [
        [
            {"w_in": w_in, "w_out": w_out}
            for w_in, w_out in zip(layer["ffn"]["w_in"], layer["ffn"]["w_out"], strict=True)
        ]
        for layer in layers
    ]
    return params | {"language": language | {"layers": {}}}, without_experts, experts


def encoders_of(params: dict) -> dict:
    """The vision encoders' parameters: those that only encoding an image needs."""
    return {name: encoder for name, encoder in params.get("vision", {}).items() if name not in MARKERS}


def on_device(tree: Any) -> Any:
    """A tree of arrays, copied from host memory."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("device")), tree)


def abstract_on_device(tree: Any) -> Any:
    """Shapes and shardings of `on_device`."""
    return jax.tree.map(functools.partial(_abstract, memory_kind="device"), tree)


def layer_without_experts(config: DecoderConfig, rngs: nnx.Rngs) -> DecoderLayer:
    """A layer with the parameters of `split_experts`: it can `attend` and route."""
    layer = DecoderLayer(config, rngs=rngs)
    del layer.ffn.w_in, layer.ffn.w_out
    return layer


def _is_experts(path: Path) -> bool:
    return path[0] == "language" and path[-1] in SINGLE_EXPERT


def _expert_sharding(path: Path, stacked: Any) -> NamedSharding:
    """Of one of the `stacked` experts on the devices."""
    return named_sharding(SINGLE_EXPERT[str(path[-1])], stacked.shape[1:], stacked.sharding.mesh)


@functools.lru_cache(maxsize=64)
def _expert_slice(sharding: Any) -> Callable[[Weight, np.int32], Weight]:
    """The jitted stacked[i], with one sharding or those of a Quantized."""
    return jax.jit(gathered_matrix, out_shardings=sharding)


def _abstract(leaf: Any, memory_kind: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(memory_kind))
