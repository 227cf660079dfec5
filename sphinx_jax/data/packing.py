"""Several short conversations in one sequence, so that fewer positions are padding."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sphinx_jax.data.conversation import IGNORE_INDEX, PADDING, Example


def pack(lengths: Sequence[int], room: int) -> list[tuple[int, ...]]:
    """The places of `lengths` in groups of at most `room` together: best fit, longest first.

    A length above `room` makes a group of its own: its conversation is cut.
    """
    groups: list[list[int]] = []
    # Open groups by the room left in them, and which amounts of room there are, sorted.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = min(lengths[place], room)
        tightest = bisect.bisect_left(rooms, length)
        if tightest < len(rooms):
            left = rooms[tightest]
            group = by_room[left].pop()
            if not by_room[left]:
                del rooms[tightest]
            groups[group].append(place)
        else:
            left, group = room, len(groups)
            groups.append([place])
        left -= length
        if not by_room.setdefault(left, []):
            bisect.insort(rooms, left)
        by_room[left].append(group)
    return [tuple(group) for group in groups]


class Packed(NamedTuple):
    """A sequence of conversations, and the number of each token's conversation: 1, 2, ...; the padding's is last.

    No conversation has number 0, the beginning that all see, so `language.cache.segment_mask` lets each see itself only
    and `segment_positions` starts each at 0.
    """

    tokens: Int[np.ndarray, "length"]
    labels: Int[np.ndarray, "length"]
    segment_ids: Int[np.ndarray, "length"]


def join(examples: Sequence[Example], length: int) -> Packed:
    """The examples one after another, cut or padded to `length`."""
    tokens, labels = (np.concatenate(part) for part in zip(*examples, strict=True))
    segment_ids = np.repeat(np.arange(1, len(examples) + 1), [len(example.tokens) for example in examples])
    fill = lambda array, value: np.pad(array[:length], (0, max(length - len(array), 0)), constant_values=value)
    joined = (fill(tokens, PADDING), fill(labels, IGNORE_INDEX), fill(segment_ids, len(examples) + 1))
    return Packed(*(part.astype(np.int32) for part in joined))
