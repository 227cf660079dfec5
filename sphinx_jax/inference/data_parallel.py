"""Which devices have which rows: groups of devices share them out, and each reads the prompts of its own.

Group g of G has rows g * R / G to (g + 1) * R / G - 1 of R, as the "batch" axis of the mesh says. A chunk of prompts
is split over the groups too, so what is read into a row is computed where the row lies.
"""

from collections.abc import Sequence

from sphinx_jax.inference.bucketing import power_of_two


def round_up_to_groups(rows: int, groups: int) -> int:
    """So many rows or a few more, as many for each group: none holds more than where every group holds them all."""
    return -(-rows // groups) * groups


def round_robin(rows: Sequence[int], groups: int, of: int, each: int) -> list[int]:
    """Those of `rows` to read prompts into first: from each group in turn, no more than `each`. `of` is R."""
    ranked = [(rank, row) for group in _by_group(rows, groups, of) for rank, row in enumerate(group[:each])]
    return [row for _, row in sorted(ranked)]


def deal(rows: Sequence[int], groups: int, of: int) -> list[int | None]:
    """What stands where in a chunk: indices into `rows`, None for padding. `of` is R.

    Every group has the same number of places, a power of two.
    """
    index = {row: i for i, row in enumerate(rows)}
    dealt = _by_group(rows, groups, of)
    each = power_of_two(max(map(len, dealt)))
    return [index[group[i]] if i < len(group) else None for group in dealt for i in range(each)]


def _by_group(rows: Sequence[int], groups: int, of: int) -> list[list[int]]:
    return [[row for row in rows if row * groups // of == group] for group in range(groups)]
