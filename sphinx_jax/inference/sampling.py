"""From scores to the next token: greedy, or drawn from the most probable tokens."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from sphinx_jax.errors import UserError
from sphinx_jax.kernels.argmax import argmax


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Raises UserError on a value outside its range."""

    temperature: float = 0.0
    """Scores are divided by it before the softmax; 0 takes the most probable token."""
    top_p: float = 0.95
    """Draw from the most probable tokens that together reach this probability; 1 is all of them."""
    top_k: int = 0
    """Draw from so many most probable tokens at most; 0 is all of them."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the answer so far become less probable; 1 changes nothing."""

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (take the best token) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (all tokens) or more, got {self.top_k}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition penalty must be above 0 (1 changes nothing), got {self.repetition_penalty}")

    def values(self) -> "SamplingValues":
        """As arrays: other settings then need no other program."""
        f32 = np.float32
        return SamplingValues(
            f32(self.temperature), f32(self.top_p), np.int32(self.top_k), f32(self.repetition_penalty)
        )


class SamplingValues(NamedTuple):
    """`SamplingParams` on the device."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    repetition_penalty: Float[Array, ""]


def penalised(
    logits: Float[Array, "num_seqs vocab"], seen: Bool[Array, "num_seqs vocab"], penalty: Float[Array, ""]
) -> Float[Array, "num_seqs vocab"]:
    """Scores of tokens seen before, moved towards less probable (CTRL, https://arxiv.org/abs/1909.05858)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def nucleus(
    logits: Float[Array, "num_seqs vocab"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    top_k: Int[Array, ""] = 0,
) -> tuple[Float[Array, "num_seqs vocab"], Int[Array, "num_seqs vocab"]]:
    """Probabilities in falling order, those left out at zero and the rest scaled to sum to 1; and their tokens.

    A token is left out if the more probable ones reach more than `top_p` without it, so that the first always
    stays (nucleus sampling, https://arxiv.org/abs/1904.09751). The `top_k` are taken first, if it is not 0.
    """
    # The best score becomes 0 first: dividing by a tiny temperature then overflows only towards probability 0.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)
    scaled = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    probabilities = jax.nn.softmax(jnp.where((rank < top_k) | (top_k == 0), scaled, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where(before > top_p, 0, probabilities)
    return kept / kept.sum(axis=-1, keepdims=True), order


def choose(
    logits: Float[Array, "num_seqs vocab"],
    seen: Bool[Array, "num_seqs vocab"],
    seeds: UInt32[Array, "num_seqs 2"],
    count: Int[Array, "num_seqs"],
    sampling: SamplingValues,
) -> Int[Array, "num_seqs"]:
    """The next token of each row.

    A row's draw depends on its own two seed words and on how many tokens it has chosen (`count`), never on its
    place in the batch or on its neighbours.
    """
    logits = penalised(logits, seen, sampling.repetition_penalty)

    def draw() -> Int[Array, "num_seqs"]:
        def noise(seed: UInt32[Array, "2"], n: Int[Array, ""]) -> Float[Array, "vocab"]:
            key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), n)
            return jax.random.gumbel(key, logits.shape[-1:])

        probabilities, order = nucleus(logits, sampling.temperature, sampling.top_p, sampling.top_k)
        # The most probable after Gumbel noise is a draw from the distribution.
        rank = jnp.argmax(jnp.log(probabilities) + jax.vmap(noise)(seeds, count), axis=-1)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, lambda: argmax(logits).astype(jnp.int32))
