"""The place of the largest of many scores."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def argmax(scores: Float[Array, "*batch n"]) -> Int[Array, "*batch"]:
    """The first largest: of the largest of each 16 the first, and in its group again the first.

    XLA:CPU compares pairs of value and index one by one, twenty times as slowly as it finds a maximum.
    """
    size = math.gcd(scores.shape[-1], 16)
    groups = scores.reshape(*scores.shape[:-1], -1, size)
    group = jnp.max(groups, axis=-1).argmax(axis=-1)
    within = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :].argmax(axis=-1)
    return group * size + within
