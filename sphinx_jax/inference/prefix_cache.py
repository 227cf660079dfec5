"""Which prompts have their first positions in the KV cache already: an index on the host, of tokens and contexts.

Keys and values of a position depend on the tokens up to it, on the image, which is after the first token, and on the
adapter: these two are the context (`Sequence.context`). So a prompt that begins like one that was prefilled in the same
context starts where the two part.
"""

import collections
import dataclasses
from collections.abc import Collection

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class CachedTokens:
    """The tokens whose keys and values a batch slot, or a prefix of the pool, holds."""

    tokens: Int[np.ndarray, "tokens"]
    context: bytes | None
    """Of the image after the first token, and of the adapter."""

    def common(self, tokens: Int[np.ndarray, "prompt"], context: bytes | None) -> int:
        """How many tokens of a prompt are the same; 0 where the contexts differ: an image is right after the first."""
        if context != self.context:
            return 0
        size = min(len(tokens), len(self.tokens))
        differ = np.flatnonzero(self.tokens[:size] != tokens[:size])
        return int(differ[0]) if len(differ) else size


NOTHING_CACHED = CachedTokens(np.zeros(0, np.int32), None)


class PrefixCache:
    """The pool of prefixes: `num_prefixes` places, of which data-parallel group g of G has the g-th G-th part.

    The least recently used prefix of a group is replaced. A place holds `prefix_len` positions.
    """

    def __init__(self, num_prefixes: int, groups: int):
        self.size, self._groups = num_prefixes, groups
        each = num_prefixes // groups
        # By group: what each place holds, the least recently used first.
        self._places = [
            collections.OrderedDict.fromkeys(range(group * each, (group + 1) * each), NOTHING_CACHED)
            for group in range(groups)
        ]
        # By context: the places, and their groups. Most prompts then meet few prefixes.
        self._by_context: dict[bytes | None, dict[int, int]] = collections.defaultdict(dict)

    def longest(
        self, tokens: Int[np.ndarray, "prompt"], context: bytes | None, groups: Collection[int]
    ) -> tuple[int, int] | None:
        """(tokens, place) of the prefix in one of `groups` that shares most tokens with a prompt; None if none does."""
        best = (0, -1)
        for place, group in self._by_context.get(context, {}).items():
            if group in groups:
                best = max(best, (self._places[group][place].common(tokens, context), place))
        return best if best[0] else None

    def touch(self, place: int) -> None:
        """Count `place` as used."""
        self._places[self._group(place)].move_to_end(place)

    def store(self, tokens: Int[np.ndarray, "prefix"], context: bytes | None, group: int) -> int:
        """The place for a new prefix in `group`, which holds it from now on."""
        place, replaced = next(iter(self._places[group].items()))
        self._by_context[replaced.context].pop(place, None)
        if not self._by_context[replaced.context]:
            del self._by_context[replaced.context]
        self._places[group][place] = CachedTokens(tokens, context)
        self._by_context[context][place] = group
        self.touch(place)
        return place

    def _group(self, place: int) -> int:
        return place * self._groups // self.size
