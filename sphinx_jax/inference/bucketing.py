"""The shapes that requests are rounded up to, so that few programs serve them all."""

from typing import NamedTuple

from jax.sharding import Mesh

import sharding

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens of a prefill chunk."""

BATCHES = (1, 4, 16)
"""Prompts of a prefill chunk, in each data-parallel group."""

PREFILL_BUDGET = 8192
"""Tokens of all prompts in one prefill chunk at most, in each data-parallel group: memory grows with them."""

INTERACTIVE_BUDGET = 2048
"""The same while sequences stream, or `prefill_tokens` where that is less: they stand still for one chunk of a long
prompt at most. Image tokens count."""

MIN_KV_LEN = 256


class ChunkSizes(NamedTuple):
    """The prefill chunks that a scheduler makes. Each size is a program: fewer are compiled sooner and padded more."""

    lengths: tuple[int, ...]
    """Tokens of a prompt, padding included."""
    batches: tuple[int, ...]
    """Prompts in each data-parallel group, padding included: the first of BATCHES."""
    budget: int
    """Tokens of all prompts of a group at most, image tokens included."""
    least: int
    """Tokens of all prompts of a group at least, padding included, if more prompts may make a chunk: a smaller one
    would hardly be faster, as all weights are read for it, and would be one more program to compile."""


FILE_CHUNKS = ChunkSizes(LENGTHS, BATCHES, PREFILL_BUDGET, least=512)

SERVER_CHUNKS = ChunkSizes((64, 128, 256, 512, 1024, 2048), BATCHES[:2], INTERACTIVE_BUDGET, least=1)
"""So few that all of them are compiled before the first request: `warmup.compile_all`."""


def bucket(n: int, lengths: tuple[int, ...] = LENGTHS) -> int:
    """The least of `lengths`, or of 3,072, 4,096, 6,144, 8,192, ... past them, that is `n` or more."""
    for size in lengths:
        if size >= n:
            return size
    size = lengths[-1]
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def batch_bucket(n: int) -> int:
    """The least of BATCHES that is `n` or more."""
    return next(size for size in BATCHES if size >= n)


def prompts_per_chunk(length: int, num_image_tokens: int, chunks: ChunkSizes, groups: int) -> int:
    """How many prompts of `length` tokens, after an image or none, a chunk holds in each of `groups` at most."""
    most = max(chunks.budget // (length + num_image_tokens), 1)
    if num_image_tokens:
        # Image embeddings are on every device.
        most = min(most, max(BATCHES[-1] // groups, 1))
    return max(size for size in chunks.batches if size <= most)


def batch_sizes(length: int, num_image_tokens: int, chunks: ChunkSizes, groups: int, num_seqs: int) -> tuple[int, ...]:
    """The numbers of prompts, padding included, that chunks of this length have in each of `groups`."""
    most = prompts_per_chunk(length, num_image_tokens, chunks, groups)
    sizes = [size for size in BATCHES if size <= batch_bucket(min(most, max(num_seqs // groups, 1)))]
    enough = [size for size in sizes if size * (length + num_image_tokens) >= chunks.least]
    return tuple(enough or sizes[-1:])


def power_of_two(n: int) -> int:
    """The least power of two that is `n` or more."""
    return 1 << (n - 1).bit_length()


def kv_bucket(n: int, cache_len: int, slice_cost: int | None) -> int:
    """Cache positions that decode steps read for sequences of up to `n`: the least of 256, 512, 1,024, ... that is `n`
    or more and less than `cache_len`, or else all of it.

    `slice_cost` is `kernels.attention.kv_slice_cost`: of what costs three passes, a part of more than a third is slower
    than all.
    """
    size = max(power_of_two(n), MIN_KV_LEN)
    return size if slice_cost is not None and size * slice_cost <= cache_len else cache_len


def prefill_tokens(mesh: Mesh) -> int:
    """Longer prompts are prefilled in chunks of this many tokens, so that memory does not grow with the prompt.

    All weights are read for each chunk. Of T tokens that choose 2 of 8 experts, each byte of the experts (bfloat16)
    is used for T / 4 operations: an H100 does 295 in the time that reading it takes, a B200 281, an A100 153. The
    other GPUs, smaller ones among them, are spared the memory: a second GiB for chunks of 2,048.
    """
    with sharding.mesh_context(mesh):
        return 2048 if sharding.compute_capability() in ("9.0", "10.0") else 512


def padded_len(num_tokens: int, chunk: int, lengths: tuple[int, ...] = LENGTHS) -> int:
    """Positions that so many tokens take while they are prefilled in chunks of `chunk`: the last one is padded to one
    of `lengths`.
    """
    rest = num_tokens % chunk
    return num_tokens - rest + (bucket(rest, lengths) if rest else 0)


def positions_for(
    text_len: int,
    num_image_tokens: int,
    max_new_tokens: int,
    max_model_len: int,
    chunk: int,
    lengths: tuple[int, ...] = LENGTHS,
) -> int:
    """Cache positions that a prompt of so many text and image tokens, padded, and its answer need at least."""
    answered = min(num_image_tokens + text_len + max_new_tokens, max_model_len)
    return max(num_image_tokens + padded_len(text_len, chunk, lengths), answered)
