"""Attention over grouped queries: one function, the backend chosen by platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
    scores_BKGQS = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
    scores_BKGQS = scores_BKGQS * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores_BKGQS = jnp.where(mask[:, None, None], scores_BKGQS, -jnp.inf)
    weights_BKGQS = jax.nn.softmax(scores_BKGQS, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights_BKGQS, v)
