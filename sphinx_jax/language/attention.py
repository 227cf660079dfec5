"""Grouped-query attention with rotary position embeddings and a KV cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import sharding
from sharding import constrain
from sphinx_jax.config import DecoderConfig, LoraConfig
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_mask import Mask
from sphinx_jax.kernels.linear import dot, matmul
from sphinx_jax.layers import LowRank, fan_in_normal, param


class LayerCache(NamedTuple):
    """Keys and values of one layer; cache position s is position s of the sequence."""

    k: Float[Array, "batch cache_len kv_heads head_dim"]
    v: Float[Array, "batch cache_len kv_heads head_dim"]


def rotate(
    x: Float[Array, "batch length kv_heads group head_dim"], positions: Int[Array, "batch length"], theta: float
) -> Float[Array, "batch length kv_heads group head_dim"]:
    """Rotary position embedding on interleaved pairs (x[2i], x[2i + 1]), in float32 (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions.astype(jnp.float32)[..., None] * frequencies)[:, :, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; queries, keys and values are one product, grouped by key/value head.

    `wqkv[dim, kv_heads, queries_per_kv + 2, head_dim]` has, for each key/value head, its query heads, its key and its
    value: sharded over the key/value heads, it needs no resharding.
    """

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        groups, head_dim = config.queries_per_kv, config.head_dim
        self.wqkv = param(
            rngs,
            (config.dim, config.num_kv_heads, groups + 2, head_dim),
            ("embed", "kv_heads", None, "head_dim"),
            fan_in_normal(config.dim),
        )
        self.wo = param(
            rngs,
            (config.num_kv_heads, groups, head_dim, config.dim),
            ("kv_heads", "queries", "head_dim", "embed"),
            fan_in_normal(config.dim),
        )
        self.wqkv_lora = LowRank(self.wqkv, lora, rngs=rngs) if lora else None
        self.wo_lora = LowRank(self.wo, lora, inputs=3, rngs=rngs) if lora else None
        self.theta = config.rope_theta

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        positions: Int[Array, "batch length"],
        mask: Mask,
        cache: LayerCache | None = None,
        rank_mask: Float[Array, "batch rank"] | None = None,
    ) -> tuple[Float[Array, "batch length dim"], LayerCache | None]:
        """Attention output, and the cache with this call's keys and values.

        `positions` are consecutive in each sequence if there is a cache: the keys and values are written at them, and
        attention is over the whole cache as `mask` allows. `rank_mask`: see `layers.LowRank`.
        """
        x = constrain(x, "batch", "sequence", None)
        qkv = matmul(x, self.wqkv[...])
        if self.wqkv_lora is not None:
            qkv += self.wqkv_lora(x, rank_mask)
        qkv = constrain(qkv, "batch", "sequence", "kv_heads", None, None)
        groups = qkv.shape[3] - 2
        rotated = rotate(qkv[:, :, :, : groups + 1], positions, self.theta)
        # Slice queries and keys while the group dimension is not sharded, and shard the query heads only afterwards: a
        # slice of a sharded dimension would move heads between devices.
        rotated = constrain(rotated, "batch", "sequence", "kv_heads", None, "head_dim")
        q, k, v = rotated[:, :, :, :groups], rotated[:, :, :, groups], qkv[:, :, :, groups + 1]
        q = constrain(q, "batch", "sequence", "kv_heads", None, "head_dim")
        if cache is not None:
            cache = LayerCache(_write(cache.k, k, positions), _write(cache.v, v, positions))
            k, v = cache.k.astype(x.dtype), cache.v.astype(x.dtype)
        q = constrain(q, "batch", "sequence", "kv_heads", "queries", "head_dim")
        out = constrain(attention(q, k, v, mask), "batch", "sequence", "kv_heads", "queries", "head_dim")
        # A two-dimensional product: XLA:CPU would transpose the matrix before a contraction over several dimensions.
        wo = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), self.wo[...])
        heads = out.reshape(*x.shape[:2], -1)
        out = dot(heads, wo)
        if self.wo_lora is not None:
            out += self.wo_lora(heads, rank_mask)
        return constrain(out, "batch", "residual", None), cache


def _write(
    cached: Float[Array, "batch cache_len kv_heads head_dim"],
    new: Float[Array, "batch length kv_heads head_dim"],
    positions: Int[Array, "batch length"],
) -> Float[Array, "batch cache_len kv_heads head_dim"]:
    """The cache with `new` written at `positions`, which are consecutive: one contiguous slice per sequence."""
    new, first = new.astype(cached.dtype), positions[:, 0]
    if sharding.platform() == "cpu" and sharding.device_count() == 1:
        # A loop over sequences updates the cache in place, where XLA:CPU copies all of it for the vmap below. XLA
        # unrolls a loop of one iteration and then copies as well: hence a trip count that it does not know.
        num_seqs = jnp.where(first[0] < 0, 0, cached.shape[0])

        def write_sequence(i, cached):
            return jax.lax.dynamic_update_slice(cached, new[i][None], (i, first[i], 0, 0))

        return jax.lax.fori_loop(0, num_seqs, write_sequence, cached)

    def write(cached, new, start):
        return jax.lax.dynamic_update_slice_in_dim(cached, new, start, 0)

    return jax.vmap(write)(cached, new, first)
