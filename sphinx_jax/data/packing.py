"""Packing: several short conversations in one sequence, so that fewer positions are padding."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sphinx_jax.data.conversation import IGNORE_INDEX, PADDING, Example


def pack(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Indices of `lengths` in bins of at most `capacity` in total: best fit decreasing.

    A length above `capacity` has a bin of its own: its conversation is truncated.
    """
    bins: list[list[int]] = []
    # Bins by the capacity that is left in them, and the distinct capacities left, sorted.
    by_left: dict[int, list[int]] = {}
    lefts: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = min(lengths[index], capacity)
        tightest = bisect.bisect_left(lefts, length)
        if tightest < len(lefts):
            left = lefts[tightest]
            chosen = by_left[left].pop()
            if not by_left[left]:
                del lefts[tightest]
            bins[chosen].append(index)
        else:
            left, chosen = capacity, len(bins)
            bins.append([index])
        left -= length
        if not by_left.setdefault(left, []):
            bisect.insort(lefts, left)
        by_left[left].append(chosen)
    return [tuple(indices) for indices in bins]


class Packed(NamedTuple):
    """A sequence of conversations with the segment id of each token: 1, 2, ..., and one more for padding.

    Segment 0 is the prefix that all segments attend to (`language.kv_cache.segment_mask`). Packed conversations have
    none, so each attends to itself only, and `segment_positions` starts each at 0.
    """

    tokens: Int[np.ndarray, "length"]
    labels: Int[np.ndarray, "length"]
    segment_ids: Int[np.ndarray, "length"]


def join(examples: Sequence[Example], length: int) -> Packed:
    """The examples one after another, truncated or padded to `length`."""
    tokens, labels = (np.concatenate(part) for part in zip(*examples, strict=True))
    segment_ids = np.repeat(np.arange(1, len(examples) + 1), [len(example.tokens) for example in examples])
    return Packed(
        _fit_to(tokens, length, PADDING),
        _fit_to(labels, length, IGNORE_INDEX),
        _fit_to(segment_ids, length, len(examples) + 1),
    )


def _fit_to(array: Int[np.ndarray, "tokens"], length: int, value: int) -> Int[np.ndarray, "length"]:
    padding = max(length - len(array), 0)
    return np.pad(array[:length], (0, padding), constant_values=value).astype(np.int32)
