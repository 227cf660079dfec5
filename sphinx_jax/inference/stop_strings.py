"""Where an answer ends: stop strings, found on the device as tokens come and cut off on the host.

A stop string may begin inside one token and end inside another. Reading text byte by byte, an automaton
(Aho and Corasick 1975) knows at each moment how much of which stop string has been seen; run over the
bytes of every token once, it becomes a table from (state, token) to the next state, which the decode
loop looks up without leaving the device.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

STOPPED, FIRST, RUNNING = 0, 1, 2
"""States: a stop string or EOS was seen; nothing was said yet; something was, and no stop has begun."""

MAX_STOP_BYTES = 512
"""All stop strings together: the table has as many rows, each as wide as the vocabulary."""


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings without repetitions. Raises UserError on an empty one, or if they are too long together."""
    if isinstance(stops, str):
        raise UserError(f"stop must be a list of strings, got the string {stops!r}; write [{stops!r}]")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UserError(f"a stop string must be a text of one character or more, got {stop!r}; leave it out")
    unique = tuple(dict.fromkeys(stops))
    total = sum(len(stop.encode()) for stop in unique)
    if total > MAX_STOP_BYTES:
        raise UserError(f"the stop strings are {total} bytes long together and the limit is {MAX_STOP_BYTES}")
    return unique


def stop_table(tokenizer: Tokenizer, vocab_size: int, stops: Sequence[str]) -> Int[np.ndarray, "states vocab"]:
    """table[state, token] is the state after that token; EOS stops from every state.

    `vocab_size` is the model's, which may be larger than the tokenizer's: the tokens beyond add nothing. Rows
    are rounded up to a multiple of 32, so that other stop strings seldom make a table of another shape.
    """
    targets = [stop.encode() for stop in stops]
    prefixes = [b"", *sorted({target[:n] for target in targets for n in range(1, len(target))})]
    number = {prefix: RUNNING + i for i, prefix in enumerate(prefixes)}
    states = -(-(RUNNING + len(prefixes)) // 32) * 32
    no_byte = 256
    step = np.full((states, 257), RUNNING, np.int16)
    step[:, no_byte] = np.arange(states)
    step[STOPPED] = STOPPED
    for prefix, state in number.items():
        for byte in set(b"".join(targets)):
            seen = prefix + bytes([byte])
            if seen.endswith(tuple(targets)):
                step[state, byte] = STOPPED
            else:
                step[state, byte] = next(number[seen[i:]] for i in range(len(seen) + 1) if seen[i:] in number)

    def run(tokens: list[bytes], start: Int[np.ndarray, "states 1"]) -> Int[np.ndarray, "states vocab"]:
        longest = max(map(len, tokens))
        spelled = np.full((len(tokens), longest), no_byte, np.int16)
        for i, token in enumerate(tokens):
            spelled[i, : len(token)] = np.frombuffer(token, np.uint8)
        state = np.broadcast_to(start, (len(start), len(tokens)))
        for column in spelled.T:
            state = step[state, column]
        return state

    beyond = [b""] * (vocab_size - tokenizer.vocab_size)
    table = run(tokenizer.token_bytes() + beyond, np.arange(states, dtype=np.int16)[:, None])
    opening = tokenizer.token_bytes(first=True) + beyond
    silent = [not token for token in tokenizer.token_bytes() + beyond]
    table[FIRST] = np.where(silent, FIRST, run(opening, np.array([[RUNNING]], np.int16))[0])
    table[:, tokenizer.eos_id] = STOPPED
    return table


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to where the first stop string begins."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class TextStream:
    """Tokens in, text out as soon as it is certain: the pieces joined are what all tokens would give at once."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: Sequence[int] = []
        self._shown = 0

    def push(self, tokens: Sequence[int]) -> str:
        """All tokens so far in; the new text that is certain out: no part of a character, nor of a stop string."""
        self._tokens = tokens
        text = cut(self._tokenizer.decode(self._tokens), self._stops)
        certain = len(text.rstrip("\ufffd"))
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text[:certain].endswith(stop[:n]))
        return self._show(text[: certain - max(begun, default=0)])

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        return self._show(cut(self._tokenizer.decode(self._tokens), self._stops))

    def _show(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new
