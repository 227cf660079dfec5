"""The shapes that requests are rounded to, so that few programs serve them all."""

from jax.sharding import Mesh

import sharding


def bucket(n: int) -> int:
    """The least of 64, 96, 128, 192, 256, 384, ... that is n or more."""
    size = 64
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def prefill_tokens(mesh: Mesh) -> int:
    """Longer prompts are read in pieces of this many tokens, so that memory does not grow with the prompt.

    All weights are read for each piece. Of T tokens that choose 2 of 8 experts, each byte of the experts (bfloat16)
    is used for T / 4 operations: an H100 does 295 in the time that reading it takes, a B200 281, an A100 153. The
    other cards, smaller ones among them, are spared the memory: a second GiB for pieces of 2,048.
    """
    with sharding.mesh_context(mesh):
        return 2048 if sharding.compute_capability() in ("9.0", "10.0") else 512


def cache_len_for(text: int, picture: int, answer: int, max_model_len: int, piece: int) -> int:
    """Positions of the cache for a prompt of so many text and picture tokens, padded as it is read, and its answer.

    It is read in pieces of `piece` tokens.
    """
    whole = text // piece * piece
    padded = picture + (whole + bucket(text - whole) if text > whole else whole)
    return bucket(max(padded, min(picture + text + answer, max_model_len)))
