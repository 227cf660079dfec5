"""From logits to the next token: greedy, or drawn from the most probable tokens. Every sequence has its own setting."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from sphinx_jax.errors import UserError
from sphinx_jax.inference.stop_strings import check_stops
from sphinx_jax.kernels.argmax import argmax

MAX_TOP_LOGPROBS = 20
"""Alternatives reported for a token at most, as in OpenAI's protocol."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How an answer is sampled and where it ends. Raises UserError on a value outside its range."""

    max_new_tokens: int = 512
    """Tokens in an answer at most."""
    temperature: float = 0.0
    """Logits are divided by it before the softmax; 0 takes the most probable token."""
    top_p: float = 0.95
    """Draw from the most probable tokens that together reach this probability; 1 is all of them."""
    top_k: int = 0
    """Draw from so many most probable tokens at most; 0 is all of them."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the answer so far become less probable; 1 changes nothing."""
    seed: int = 0
    """With a temperature, the same seed gives the same text, on every mesh and in every batch."""
    stop: Sequence[str] = ()
    """The answer ends before any of these texts."""
    ignore_eos: bool = False
    """Neither EOS nor the template's end signal ends the answer: for measurements that need its length fixed."""
    top_logprobs: int = 0
    """Alternatives whose log-probabilities are reported beside each token."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens must be 1 or more, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (take the best token) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top-k must be 0 (all tokens) or more, got {self.top_k}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition penalty must be above 0 (1 changes nothing), got {self.repetition_penalty}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UserError(f"top-logprobs must be from 0 to {MAX_TOP_LOGPROBS}, got {self.top_logprobs}")
        object.__setattr__(self, "stop", check_stops(self.stop))


GREEDY = SamplingParams()


class SamplingArrays(NamedTuple):
    """The settings of a batch of sequences, on the device or to be sent there: other settings need no other program."""

    temperature: Float[Array, "batch"]
    top_p: Float[Array, "batch"]
    top_k: Int[Array, "batch"]
    repetition_penalty: Float[Array, "batch"]

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> "SamplingArrays":
        """The settings of several sequences."""
        dtypes = {"temperature": np.float32, "top_p": np.float32, "top_k": np.int32, "repetition_penalty": np.float32}
        columns: dict[str, Any] = {
            name: np.array([getattr(p, name) for p in params], dtype) for name, dtype in dtypes.items()
        }
        return cls(**columns)


def penalize(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Float[Array, "batch"]
) -> Float[Array, "batch vocab"]:
    """Logits of tokens seen before, moved towards less probable (CTRL, https://arxiv.org/abs/1909.05858)."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def nucleus(
    logits: Float[Array, "batch vocab"],
    temperature: Float[Array, "batch"],
    top_p: Float[Array, "batch"],
    top_k: Int[Array, "batch"],
) -> tuple[Float[Array, "batch vocab"], Int[Array, "batch vocab"]]:
    """Probabilities in falling order, those left out at zero and the rest scaled to sum to 1; and their tokens.

    A token is left out if the more probable ones reach more than `top_p` without it, so that the first always
    stays (nucleus sampling, https://arxiv.org/abs/1904.09751). The `top_k` are taken first, if it is not 0.
    """
    temperature, top_p, top_k = temperature[:, None], top_p[:, None], top_k[:, None]
    # The best logit becomes 0 first: dividing by a tiny temperature then overflows only towards probability 0.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)
    scaled = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    probabilities = jax.nn.softmax(jnp.where((rank < top_k) | (top_k == 0), scaled, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where(before > top_p, 0, probabilities)
    return kept / kept.sum(axis=-1, keepdims=True), order


def sample(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    seeds: UInt32[Array, "batch 2"],
    count: Int[Array, "batch"],
    sampling: SamplingArrays,
) -> Int[Array, "batch"]:
    """The next token of each sequence.

    A draw depends on the sequence's own two seed words and on how many tokens it has sampled (`count`), never on its
    batch slot or on its neighbours.
    """
    logits = penalize(logits, seen, sampling.repetition_penalty)
    greedy = argmax(logits).astype(jnp.int32)
    is_random = sampling.temperature > 0

    def draw() -> Int[Array, "batch"]:
        def noise(seed: UInt32[Array, "2"], n: Int[Array, ""]) -> Float[Array, "vocab"]:
            key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), n)
            return jax.random.gumbel(key, logits.shape[-1:])

        temperature = jnp.where(is_random, sampling.temperature, 1)
        probabilities, order = nucleus(logits, temperature, sampling.top_p, sampling.top_k)
        # The most probable after Gumbel noise is a draw from the distribution.
        rank = jnp.argmax(jnp.log(probabilities) + jax.vmap(noise)(seeds, count), axis=-1)
        drawn = jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where(is_random, drawn, greedy)

    # Sorting the vocabulary costs more than a small model's decode step: a batch without a draw skips it.
    return jax.lax.cond(is_random.any(), draw, lambda: greedy)
