"""Log-probabilities of a given text, token by token: what evaluation suites score answers by."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sphinx_jax.inference.sampling import MAX_TOP_LOGPROBS
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.model import bind

LENGTHS = (128, 512, 2048)
"""Texts are padded to these, or to powers of two past them: a program for each."""

CHUNK = 128
"""Positions whose logits are in memory at a time."""


class PromptLogprobs(NamedTuple):
    """`logprobs[i]` and `top[i]` (tokens, log-probabilities, in falling order) belong to `tokens[i + 1]`."""

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[list[int], list[float]]]


def padded_len(length: int) -> int:
    """The length that a text of so many tokens is padded to."""
    return next((size for size in LENGTHS if size >= length), 1 << (length - 1).bit_length())


def padded_lens(max_len: int) -> list[int]:
    """The lengths that texts of up to `max_len` tokens are padded to."""
    lengths = [padded_len(1)]
    while lengths[-1] < max_len:
        lengths.append(padded_len(lengths[-1] + 1))
    return lengths


def score(
    graph: nnx.GraphDef,
    vocab_size: int,
    params: dict[str, Any],
    tokens: Int[Array, "1 length"],
    rank_mask: Float[Array, "1 rank"] | None = None,
) -> tuple[Float[Array, "length"], Int[Array, "length top"], Float[Array, "length top"]]:
    """At each position, the log-probability of the next token, and the most probable tokens with theirs.

    The logits of all positions at once would be 32,000 floats for each: they are made CHUNK positions at a time.
    `length` is a multiple of CHUNK. What is padded on the right no earlier position sees. `rank_mask`: of the adapter.
    """
    model = bind(graph, params)
    length = tokens.shape[1]
    hidden, _, _ = model.language(model.embed(tokens), jnp.arange(length)[None], Causal(), rank_mask=rank_mask)
    following = jnp.roll(tokens, -1, axis=1)

    def of_chunk(
        chunk: tuple[Float[Array, "chunk dim"], Int[Array, "chunk"]],
    ) -> tuple[Float[Array, "chunk"], Int[Array, "chunk top"], Float[Array, "chunk top"]]:
        hidden, following = chunk
        logits = model.language.logits(hidden[None])[0]
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        values, ids = jax.lax.top_k(logprobs, min(MAX_TOP_LOGPROBS, vocab_size))
        return jnp.take_along_axis(logprobs, following[:, None], axis=1)[:, 0], ids, values

    chunks = hidden[0].reshape(-1, CHUNK, hidden.shape[-1]), following[0].reshape(-1, CHUNK)
    scored = jax.lax.map(of_chunk, chunks)
    return jax.tree.map(lambda x: x.reshape(length, *x.shape[2:]), scored)


def padded(tokens: list[int]) -> Int[np.ndarray, "1 length"]:
    """The tokens as `score` takes them."""
    row = np.zeros((1, padded_len(len(tokens))), np.int32)
    row[0, : len(tokens)] = tokens
    return row


def unpadded(tokens: list[int], scored: tuple[np.ndarray, np.ndarray, np.ndarray]) -> PromptLogprobs:
    """What `score` gave for `padded(tokens)`."""
    logprobs, ids, values = (array[: len(tokens) - 1].tolist() for array in scored)
    return PromptLogprobs(list(tokens), logprobs, list(zip(ids, values, strict=True)))
