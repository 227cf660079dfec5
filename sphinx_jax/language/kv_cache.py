"""The KV cache, and masks and positions of several segments in one sequence."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sharding import constrain
from sphinx_jax.config import DecoderConfig
from sphinx_jax.language.attention import LayerCache

Cache = list[LayerCache]


def make_cache(config: DecoderConfig, batch: int, cache_len: int, dtype: DTypeLike) -> Cache:
    """A KV cache of zeros: 2 x layers x cache_len x kv_heads x head_dim values per sequence of the batch."""
    shape = (batch, cache_len, config.num_kv_heads, config.head_dim)

    def zeros() -> Float[Array, "batch cache_len kv_heads head_dim"]:
        return constrain(jnp.zeros(shape, dtype), "batch", None, "kv_heads", None)

    return [LayerCache(zeros(), zeros()) for _ in range(config.num_layers)]


def segment_mask(segment_ids: Int[Array, "batch length"]) -> Bool[Array, "batch length length"]:
    """The causal mask in which each segment attends to itself and to segment 0, the shared prefix.

    Several questions about one image in one sequence then give the same logits as separate sequences, provided that
    every segment's positions continue those of segment 0 (`segment_positions`).
    """
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = (segment_ids[:, None, :] == segment_ids[:, :, None]) | (segment_ids[:, None, :] == 0)
    return causal & same


def segment_positions(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """The position of each token if its segment followed segment 0 directly."""
    index = jnp.arange(segment_ids.shape[1])[None, :]
    starts = (segment_ids[:, None, :] == segment_ids[:, :, None]).argmax(axis=-1)
    prefix_len = (segment_ids == 0).sum(axis=-1, keepdims=True)
    return jnp.where(segment_ids == 0, index, prefix_len + index - starts)
