"""Allocating the key/value cache, and the mask of several turns in one sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sharding import constrain
from sphinx_jax.config import DecoderConfig
from sphinx_jax.language.attention import LayerCache

Cache = list[LayerCache]


def make_cache(config: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache: 2 x layers x slots x kv_heads x head_dim values for each of `batch` rows."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    empty = lambda: constrain(jnp.zeros(shape, dtype), "batch", None, "kv_heads", None)
    return [LayerCache(empty(), empty()) for _ in range(config.num_layers)]


def segment_mask(segment_ids: Int[Array, "batch length"]) -> Bool[Array, "batch length length"]:
    """Causal, and each turn sees only itself and turn 0, the shared beginning.

    Several questions about one picture then train in one sequence exactly as if each were asked alone,
    provided that positions start again after turn 0 (`segment_positions`).
    """
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = (segment_ids[:, None, :] == segment_ids[:, :, None]) | (segment_ids[:, None, :] == 0)
    return causal & same


def segment_positions(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Position of each token if its turn followed turn 0 directly."""
    index = jnp.arange(segment_ids.shape[1])[None, :]
    starts = (segment_ids[:, None, :] == segment_ids[:, :, None]).argmax(axis=-1)
    shared = (segment_ids == 0).sum(axis=-1, keepdims=True)
    return jnp.where(segment_ids == 0, index, shared + index - starts)
