"""What a checkpoint is loaded into: the model's graph and parameters on a mesh.

The one place where this package meets the model: everything else here knows names and shapes only.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from sharding import abstract_params, default_mesh_shape, make_mesh
from sphinx_jax.config import LoraConfig, SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.lora_params import split
from sphinx_jax.model import SphinxMoE

Params = dict[str, Any]

_DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in memory: `model.bind(graph, params)` makes it callable.

    `tokenizer_bytes` is the SentencePiece file that lay beside the weights, None if there was none.
    """

    config: SphinxConfig
    graph: nnx.GraphDef
    params: Params
    tokenizer_bytes: bytes | None
    mesh: Mesh


def model_mesh(config: SphinxConfig) -> Mesh:
    """The mesh that a model gets when the user names none: all devices, split by tensor, then by expert."""
    language = config.language
    shape = default_mesh_shape(jax.device_count(), language.num_kv_heads, language.num_experts)
    return make_mesh(**dataclasses.asdict(shape))


def abstract_model(config: SphinxConfig, mesh: Mesh, dtype: str | None, unstacked: bool) -> tuple[nnx.GraphDef, Params]:
    """Graph and abstract, sharded parameters of the model; float32 where `dtype` is None.

    `unstacked` holds the decoder's layers as a list instead of stacked. Raises UserError on an unknown dtype.
    """
    if dtype not in (None, *_DTYPES):
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(_DTYPES)}")
    return abstract_params(lambda rngs: SphinxMoE(config, unstacked=unstacked, rngs=rngs), mesh, dtype=dtype)


def abstract_adapters(config: SphinxConfig, lora: LoraConfig) -> Params:
    """Shapes of the model's adapters, layers stacked."""
    return split(abstract_params(lambda rngs: SphinxMoE(config, lora=lora, rngs=rngs), make_mesh())[1])[1]


def layers_are_unstacked(params: Params) -> bool:
    """Whether the decoder's layers are a list, with numbers for keys, rather than stacked."""
    return isinstance(next(iter(params["language"]["layers"])), int)
