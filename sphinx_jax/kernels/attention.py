"""Attention over grouped queries: one function, the backend chosen by platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sharding import per_device


def attention(
    q: Float[Array, "batch q_len kv_heads group head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    mask: Bool[Array, "batch q_len kv_len"] | None = None,
) -> Float[Array, "batch q_len kv_heads group head_dim"]:
    """softmax(q k' / sqrt(head_dim)) v, each key and value head serving `group` query heads.

    `mask` is True where a query may look; None means all keys. Scores and softmax are float32. Keys
    and values are never repeated: the group is a dimension of the query alone.
    """
    if q.shape[1] == 1:
        heads = ("batch", None, "kv_heads", "queries", "head_dim")
        keys = ("batch", None, "kv_heads", None)
        mask = jnp.ones((q.shape[0], 1, k.shape[1]), bool) if mask is None else mask
        own = per_device(_one_query, (heads, keys, keys, ("batch", None, None)), heads, sum_over=())
        return own(q, k, v, mask)
    scores_BKGQS = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
    scores_BKGQS = scores_BKGQS * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores_BKGQS = jnp.where(mask[:, None, None], scores_BKGQS, -jnp.inf)
    weights_BKGQS = jax.nn.softmax(scores_BKGQS, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights_BKGQS, v)


def _one_query(q, k, v, mask):
    """The same for one query a row, on one device's heads, reading keys and values where they lie.

    With the heads as a dimension of the products, XLA transposes both for it, which of a cache means all of it for
    every word. So each query head is written out over the channels of all key heads, zero but in its own, and of its
    output over the channels of all value heads its own are kept: more arithmetic, in a time that reading takes anyway.
    """
    batch, _, kv_heads, group, head_dim = q.shape
    own = jnp.eye(kv_heads, dtype=q.dtype)[:, None, :, None]
    flat = lambda x: x.reshape(batch, -1, kv_heads * head_dim)
    wide_BHC = flat(q[:, 0, :, :, None] * own)
    scores_BHS = jnp.einsum("bhc,bsc->bhs", wide_BHC, flat(k), preferred_element_type=jnp.float32)
    scores_BHS = jnp.where(mask, scores_BHS * (head_dim**-0.5), -jnp.inf)
    weights_BHS = jax.nn.softmax(scores_BHS, axis=-1).astype(v.dtype)
    out_BHC = jnp.einsum("bhs,bsc->bhc", weights_BHS, flat(v))
    return jnp.sum(out_BHC.reshape(batch, kv_heads, group, kv_heads, head_dim) * own, axis=3)[:, None]
