"""Attention masks: causal with a start position per sequence, or boolean."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Causal(NamedTuple):
    """Query i of a sequence is at position start + i and attends to the keys at positions 0 to start + i.

    Keys and values at later positions must be finite.
    """

    start: Int[Array, "batch"] | None = None
    """Position of the first query. None: queries and keys have the same positions, from 0."""
    kv_len: int | None = None
    """Static: no query needs keys and values past the first `kv_len`. None: they may need all."""


Mask = Bool[Array, "#batch q_len kv_len"] | Causal | None
"""Boolean: True where a query attends to a key; each query attends to at least one. None: no mask."""


def dense_mask(mask: Mask, q_len: int, kv_len: int) -> Bool[Array, "#batch q_len kv_len"]:
    """The mask as a boolean array with one entry per pair of query and key."""
    if mask is None:
        return jnp.ones((1, q_len, kv_len), bool)
    if isinstance(mask, Causal):
        start = jnp.zeros(1, jnp.int32) if mask.start is None else mask.start
        return jnp.arange(kv_len) <= (start[:, None] + jnp.arange(q_len))[:, :, None]
    return mask
