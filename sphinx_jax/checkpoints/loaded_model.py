"""The result of loading: the model's graph and parameters on a mesh.

The only place where this package depends on the model: everything else knows names and shapes only.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from sharding import abstract_params, default_mesh_shape, make_mesh
from sphinx_jax.config import LoraConfig, SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import QuantizedDtype
from sphinx_jax.lora_params import split
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params

Params = dict[Any, Any]

_DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded model: `model.bind(graph, params)` makes it callable.

    `tokenizer_bytes` is the checkpoint's SentencePiece file, None if it has none. `assets` are its tokenizer's files
    by name, with the generation config and the chat template, `where` the directory, and `expected_tokens` the size of
    the tokenizer that goes with a model that this program did not write.
    """

    config: SphinxConfig
    graph: nnx.GraphDef
    params: Params
    tokenizer_bytes: bytes | None
    mesh: Mesh
    assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    where: str = "the checkpoint"
    expected_tokens: int | None = None


def model_mesh(config: SphinxConfig) -> Mesh:
    """The default mesh of a model: all devices, tensor parallel first, then expert parallel."""
    language = config.language
    shape = default_mesh_shape(jax.device_count(), language.num_kv_heads, language.num_experts)
    return make_mesh(**dataclasses.asdict(shape))


def abstract_model(
    config: SphinxConfig, mesh: Mesh, dtype: str | None, unstacked: bool, quantized: QuantizedDtype | None = None
) -> tuple[nnx.GraphDef, Params]:
    """Graph and abstract, sharded parameters of the model; float32 where `dtype` is None.

    `unstacked` makes the decoder's layers a list instead of stacked. With `quantized` the decoder's matrices are
    `Quantized`. Raises UserError on an unknown dtype, or if the mesh cannot shard quantized matrices.
    """
    if dtype not in (None, *_DTYPES):
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(_DTYPES)}")
    graph, params = abstract_params(lambda rngs: SphinxMoE(config, unstacked=unstacked, rngs=rngs), mesh, dtype=dtype)
    return graph, abstract_quantized_params(params, quantized) if quantized else params


def abstract_adapters(config: SphinxConfig, lora: LoraConfig) -> Params:
    """Abstract adapters of the model, layers stacked."""
    params: Params = abstract_params(lambda rngs: SphinxMoE(config, lora=lora, rngs=rngs), make_mesh())[1]
    return split(params)[1]


def layers_are_unstacked(params: Params) -> bool:
    """Whether the decoder's layers are a list, with integer keys, rather than stacked."""
    return isinstance(next(iter(params["language"]["layers"])), int)
