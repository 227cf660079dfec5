"""Where an answer ends: EOS and the template's end signal on the device, a request's own stop strings on the host.

A stop string may begin inside one token and end inside another. Reading text byte by byte, an automaton
(Aho and Corasick 1975) knows at each moment how much of which stop string has been seen; run over the
bytes of every token once, it becomes a table from (state, token) to the next state, which the decode
loop looks up without leaving the device. The table has one shape, so a request's stop strings never compile anything.
"""

import codecs
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

STOPPED, FIRST, RUNNING = 0, 1, 2
"""States: a stop string or EOS was seen; no text was sampled yet; some was, and no stop string has begun."""

NUM_STATES = 32
EOS_ONLY = NUM_STATES - 1
"""State of sequences that nothing but EOS ends on the device: raw prompts, outside of the template."""
NEVER = NUM_STATES - 2
"""State of sequences that nothing ends on the device but their limit."""

MAX_STOP_BYTES = 512
"""Bytes of all stop strings of a request together: the text held back while one may have begun."""


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings without repetitions. Raises UserError on an empty one, or if they are too long together."""
    if isinstance(stops, str):
        raise UserError(f"stop must be a list of strings, got the string {stops!r}; write [{stops!r}]")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise UserError(f"a stop string must be a text of one character or more, got {stop!r}; leave it out")
    unique = tuple(dict.fromkeys(stops))
    total = sum(len(stop.encode(errors="surrogatepass")) for stop in unique)
    if total > MAX_STOP_BYTES:
        raise UserError(f"the stop strings are {total} bytes long together and the limit is {MAX_STOP_BYTES}")
    return unique


def stop_table(tokenizer: Tokenizer, vocab_size: int, stops: Sequence[str]) -> Int[np.ndarray, "states vocab"]:
    """table[state, token] is the state after that token; EOS stops from every state but NEVER.

    `vocab_size` is the model's, which may be larger than the tokenizer's: the tokens beyond add nothing.
    Raises ValueError if the automaton of `stops` needs more than NUM_STATES states.
    """
    targets = [stop.encode() for stop in stops]
    prefixes = [b"", *sorted({target[:n] for target in targets for n in range(1, len(target))})]
    state_of = {prefix: RUNNING + i for i, prefix in enumerate(prefixes)}
    if RUNNING + len(prefixes) > NEVER:
        raise ValueError(f"{len(prefixes)} beginnings of stop strings, more than the {NUM_STATES} states have room for")
    no_byte = 256
    step = np.full((NUM_STATES, 257), RUNNING, np.int16)
    step[:, no_byte] = np.arange(NUM_STATES)
    for state in (STOPPED, EOS_ONLY, NEVER):
        step[state] = state
    for prefix, state in state_of.items():
        for byte in set(b"".join(targets)):
            seen = prefix + bytes([byte])
            if seen.endswith(tuple(targets)):
                step[state, byte] = STOPPED
            else:
                step[state, byte] = next(state_of[seen[i:]] for i in range(len(seen) + 1) if seen[i:] in state_of)

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
    tokens = tokenizer.token_bytes() + beyond
    table = run(tokens, np.arange(NUM_STATES, dtype=np.int16)[:, None])
    opening = run(tokenizer.token_bytes(first=True) + beyond, np.array([[RUNNING]], np.int16))[0]
    table[FIRST] = np.where([not token for token in tokens], FIRST, opening)
    table[:, list(tokenizer.eos_ids)] = STOPPED
    table[NEVER] = NEVER
    return table


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """As SentencePiece decodes: U+FFFD for each byte that is no UTF-8."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("sphinx_jax.replace_each_byte", _replace_each_byte)


@functools.lru_cache(maxsize=4)
def _token_bytes(tokenizer: Tokenizer) -> tuple[list[bytes], list[bytes]]:
    """What each token adds to the text, as its first token and later: made once, as it takes milliseconds."""
    return tokenizer.token_bytes(first=True), tokenizer.token_bytes()


class Detokenizer:
    """Tokens in, text out, in time linear in their number: bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        """`continues`: the tokens go on within a text, so that the first keeps its leading space."""
        self._first, self._rest = _token_bytes(tokenizer)
        self._is_first = not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")("sphinx_jax.replace_each_byte")

    def push(self, token: int) -> str:
        """The text that is certain after `token`; tokens past the tokenizer's pieces add nothing."""
        if token >= len(self._rest):
            return ""
        added = (self._first if self._is_first else self._rest)[token]
        # Control tokens add nothing; the first of the others loses its leading space.
        self._is_first = self._is_first and not self._rest[token]
        return self._decoder.decode(added)

    def finish(self) -> str:
        """The text of what was held back."""
        return self._decoder.decode(b"", final=True)


class TextStream:
    """Tokens in, text out as soon as it is certain: what may become a stop string is held back.

    The pieces joined are the answer's text, whatever the chunking. `num_tokens` counts the tokens up to the one that
    completes a stop string, which ends the stream: `stopped`.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], continues: bool = False):
        self._detokenizer, self._stops = Detokenizer(tokenizer, continues), tuple(stops)
        self._held = ""
        self.num_tokens = 0
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """New tokens in; the new text that is certain out."""
        out = ""
        for token in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            out += self._release(self._detokenizer.push(token))
        return out

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        out = self._release(self._detokenizer.finish())
        out, self._held = out + self._held, ""
        return out

    def _release(self, new: str) -> str:
        """Add `new` to the text that is held; the part of it that no stop string can reach any more."""
        self._held += new
        if not self._held:
            return ""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            out, self._held, self.stopped = self._held[: min(found)], "", True
            return out
        begun = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        certain = len(self._held) - max(begun, default=0)
        out, self._held = self._held[:certain], self._held[certain:]
        return out
