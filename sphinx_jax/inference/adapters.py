"""Adapters that are served together on one base: each sequence has its own, or none.

The factors of all adapters are next to each other along the rank: x a gives the ranks of every adapter, a mask leaves
those of the sequence's own, and the product with b adds them. So adapters of any number and rank are one pair of
factors (`layers.LowRank`), sharded like those of a single one, and a batch of mixed adapters has no product of its own
for each. A step reads the factors of all adapters: their ranks together should be far fewer than a matrix has rows.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool

import sharding
from sphinx_jax.checkpoints.loaded_model import Loaded
from sphinx_jax.checkpoints.source import Adapters, lora_config
from sphinx_jax.config import LoraConfig
from sphinx_jax.lora_params import SUFFIX, Params, join, split
from sphinx_jax.model import SphinxMoE

RankMasks = Mapping[str, Bool[np.ndarray, "rank"]]
"""By name of the adapter: which of all ranks are its own."""


def rank_masks(adapters: Mapping[str, Adapters]) -> RankMasks:
    """Which ranks belong to each adapter, in their order."""
    owner = np.repeat(np.arange(len(adapters)), [lora_config(own).rank for own in adapters.values()])
    return {name: owner == i for i, name in enumerate(adapters)}


def served_lora(adapters: Mapping[str, Adapters]) -> LoraConfig:
    """The sizes of all adapters together. The scale of each is in its own b."""
    configs = [lora_config(own) for own in adapters.values()]
    rank = sum(config.rank for config in configs)
    adapts_experts = any(config.target_modules == "all" for config in configs)
    return LoraConfig(rank, float(rank), "all" if adapts_experts else "attention")


def join_adapters(loaded: Loaded, adapters: Mapping[str, Adapters]) -> tuple[nnx.GraphDef, Params]:
    """Graph and parameters of a loaded model with adapters, these in the dtype of its embedding."""
    lora, dtype = served_lora(adapters), loaded.params["language"]["embedding"]["table"].dtype
    graph, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(loaded.config, unstacked=True, lora=lora, rngs=rngs), loaded.mesh, dtype=dtype
    )

    def place(keys: tuple[Any, ...], target: jax.ShapeDtypeStruct) -> jax.Array:
        factor = _factor(tuple(key.key for key in keys), target, adapters)
        assert target.sharding is not None
        return jax.make_array_from_callback(target.shape, target.sharding, factor.__getitem__)

    return graph, join(loaded.params, jax.tree_util.tree_map_with_path(place, split(params)[1]))


def _factor(path: tuple[str | int, ...], target: jax.ShapeDtypeStruct, adapters: Mapping[str, Adapters]) -> np.ndarray:
    """The factor at `path` of all adapters next to each other, zero where one has none; the scale is in b."""
    *module, name, which = path
    layer = next(key for key in module if isinstance(key, int))
    matrix = (*(str(key) for key in module if key != layer), str(name).removesuffix(SUFFIX))
    out, start = np.zeros(target.shape, np.float32), 0
    for own in adapters.values():
        if matrix in own.factors:
            a, b = (factor[layer] for factor in own.factors[matrix])
            columns = slice(start, start + a.shape[-1])
            if which == "a":
                out[..., columns] = a
            elif "ffn" in matrix:
                out[:, columns] = own.scale * b
            else:
                out[columns] = own.scale * b
        start += lora_config(own).rank
    return out.astype(target.dtype)
