"""Grouped-query attention with rotary positions, and the cache that decoding reads."""

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
from sphinx_jax.kernels.linear import matmul
from sphinx_jax.layers import LowRank, fan_in_normal, param


class LayerCache(NamedTuple):
    """Keys and values of one layer; slot s holds position s of the row."""

    k: Float[Array, "batch slots kv_heads head_dim"]
    v: Float[Array, "batch slots kv_heads head_dim"]


def rotate(
    x: Float[Array, "batch length kv_heads any head_dim"], positions: Int[Array, "batch length"], theta: float
) -> Float[Array, "batch length kv_heads any head_dim"]:
    """Rotary positions on interleaved pairs (x[2i], x[2i + 1]), in float32 (https://arxiv.org/abs/2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions.astype(jnp.float32)[..., None] * frequencies)[:, :, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Queries, keys and values in one product, grouped by key/value head.

    `wqkv[dim, kv_heads, queries_per_kv + 2, head_dim]` holds, for each key/value head, its query
    heads, then its key, then its value: split over the key/value heads it needs no reshuffling.
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

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        positions: Int[Array, "batch length"],
        mask: Mask,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "batch length dim"], LayerCache | None]:
        """With a cache, this call's keys and values are written at `positions` before they are read."""
        x = constrain(x, "batch", "sequence", None)
        qkv = matmul(x, self.wqkv[...].astype(x.dtype))
        if self.wqkv_lora is not None:
            qkv += self.wqkv_lora(x)
        qkv = constrain(qkv, "batch", "sequence", "kv_heads", None, None)
        groups = qkv.shape[3] - 2
        turned = rotate(qkv[:, :, :, : groups + 1], positions, self.theta)
        # Cut while whole, and only then split by query heads: a cut through what is split moves heads about.
        whole = lambda part: constrain(part, "batch", "sequence", "kv_heads", None, "head_dim")
        turned = whole(turned)
        q, k, v = whole(turned[:, :, :, :groups]), turned[:, :, :, groups], qkv[:, :, :, groups + 1]
        if cache is not None:
            cache = LayerCache(_write(cache.k, k, positions), _write(cache.v, v, positions))
            k, v = cache.k.astype(x.dtype), cache.v.astype(x.dtype)
        q = constrain(q, "batch", "sequence", "kv_heads", "queries", "head_dim")
        out = constrain(attention(q, k, v, mask), "batch", "sequence", "kv_heads", "queries", "head_dim")
        # Of two dimensions: XLA:CPU transposes the matrix first if it is summed over more.
        wo = self.wo[...].astype(x.dtype).reshape(-1, x.shape[-1])
        heads = out.reshape(*x.shape[:2], -1)
        out = heads @ wo
        if self.wo_lora is not None:
            out += self.wo_lora(heads)
        return constrain(out, "batch", "residual", None), cache


def _write(slots: Array, new: Array, positions: Int[Array, "batch length"]) -> Array:
    """`new` written into each row at its first position on: one contiguous run a row."""
    new, first = new.astype(slots.dtype), positions[:, 0]
    if sharding.platform() == "cpu" and sharding.device_count() == 1:
        # Row by row in place; of the form below XLA:CPU copies the whole cache for a single row. So it does of a loop
        # of one round, which it takes apart: hence a bound that it does not know.
        rows = jnp.where(first[0] < 0, 0, slots.shape[0])
        row = lambda i, slots: jax.lax.dynamic_update_slice(slots, new[i][None], (i, first[i], 0, 0))
        return jax.lax.fori_loop(0, rows, row, slots)
    write_row = lambda row, values, start: jax.lax.dynamic_update_slice_in_dim(row, values, start, 0)
    return jax.vmap(write_row)(slots, new, first)
