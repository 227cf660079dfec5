"""Which devices hold which batch slots: data-parallel groups split them, and each prefills the slots of its own.

Group g of G has slots g * S / G to (g + 1) * S / G - 1 of S, as the "batch" axis of the mesh says. A chunk of prompts
is split over the groups too, so that keys and values are computed where the slot is: no collective moves them.
"""

from collections.abc import Sequence


def round_up_to_groups(count: int, groups: int) -> int:
    """The least multiple of `groups` that is `count` or more."""
    return -(-count // groups) * groups


def group_of(slot: int, groups: int, num_slots: int) -> int:
    """The group that holds `slot` of `num_slots`."""
    return slot * groups // num_slots


def assign(slots: Sequence[int], groups: int, num_slots: int, sizes: Sequence[int]) -> list[int | None]:
    """What goes where in a chunk: indices into `slots`, None for padding.

    Every group has the same number of places: the least of `sizes` that is enough.
    """
    by_group: list[list[int]] = [[] for _ in range(groups)]
    for index, slot in enumerate(slots):
        by_group[group_of(slot, groups, num_slots)].append(index)
    most = max(map(len, by_group))
    each = next(size for size in sizes if size >= most)
    return [group[i] if i < len(group) else None for group in by_group for i in range(each)]
