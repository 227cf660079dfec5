"""Which query may look at which key."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Causal(NamedTuple):
    """Query i of a row stands at position start + i and sees keys 0 to its own; what lies past them must be finite."""

    start: Int[Array, "batch"] | None = None
    """None: queries and keys are of the same positions, from 0 on."""


Mask = Bool[Array, "batch q_len kv_len"] | Causal | None
"""True where a query may look, which is somewhere for each; None: all see all."""


def written_out(mask: Mask, q_len: int, kv_len: int) -> Bool[Array, "#batch q_len kv_len"]:
    """The mask with an entry for each pair."""
    if mask is None:
        return jnp.ones((1, q_len, kv_len), bool)
    if isinstance(mask, Causal):
        start = jnp.zeros(1, jnp.int32) if mask.start is None else mask.start
        return jnp.arange(kv_len) <= (start[:, None] + jnp.arange(q_len))[:, :, None]
    return mask
