"""The shapes that requests are rounded up to, so that few programs serve them all."""

from jax.sharding import Mesh

import sharding

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens of a prefill chunk."""

BATCHES = (1, 4, 16)
"""Prompts of a prefill chunk, in each data-parallel group."""

MIN_KV_LEN = 256


def bucket(n: int) -> int:
    """The least of LENGTHS, or of 3,072, 4,096, 6,144, 8,192, ... past them, that is `n` or more."""
    for size in LENGTHS:
        if size >= n:
            return size
    size = LENGTHS[-1]
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def batch_bucket(n: int) -> int:
    """The least of BATCHES that is `n` or more."""
    return next(size for size in BATCHES if size >= n)


def power_of_two(n: int) -> int:
    """The least power of two that is `n` or more."""
    return 1 << (n - 1).bit_length()


def kv_bucket(n: int, cache_len: int) -> int:
    """Cache positions that decode steps read for sequences of up to `n`: the least of 256, 512, 1,024, ... that is `n`
    or more, up to a third of `cache_len`; past that all of it.

    XLA copies a slice of the KV cache before the product that reads it (compiled for an A100): read, write and read
    again. More than a third of the cache is read faster where it is.
    """
    size = max(power_of_two(n), MIN_KV_LEN)
    return size if 3 * size <= cache_len else cache_len


def prefill_tokens(mesh: Mesh) -> int:
    """Longer prompts are prefilled in chunks of this many tokens, so that memory does not grow with the prompt.

    All weights are read for each chunk. Of T tokens that choose 2 of 8 experts, each byte of the experts (bfloat16)
    is used for T / 4 operations: an H100 does 295 in the time that reading it takes, a B200 281, an A100 153. The
    other GPUs, smaller ones among them, are spared the memory: a second GiB for chunks of 2,048.
    """
    with sharding.mesh_context(mesh):
        return 2048 if sharding.compute_capability() in ("9.0", "10.0") else 512


def padded_len(num_tokens: int, chunk: int) -> int:
    """Positions that so many tokens take while they are prefilled in chunks of `chunk`: the last one is padded."""
    rest = num_tokens % chunk
    return num_tokens - rest + (bucket(rest) if rest else 0)


def positions_for(text_len: int, num_image_tokens: int, max_new_tokens: int, max_model_len: int, chunk: int) -> int:
    """Cache positions that a prompt of so many text and image tokens, padded, and its answer need at least."""
    answered = min(num_image_tokens + text_len + max_new_tokens, max_model_len)
    return max(num_image_tokens + padded_len(text_len, chunk), answered)
