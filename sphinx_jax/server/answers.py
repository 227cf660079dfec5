"""From what the scheduler delivers to the JSON of OpenAI's protocol: choices, log-probabilities, usage, events."""

import functools
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.inference.requests import Request, TopLogprobs
from sphinx_jax.server.api_errors import ApiError
from sphinx_jax.server.ticket import Delivery, Ticket

LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(content: object) -> bytes:
    """One event of a stream."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


class TokenNames:
    """What tokens are called in an answer: the text that they add, and its bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._first, self._rest = tokenizer.token_bytes(first=True), tokenizer.token_bytes()
        self.longest = max(map(len, self._rest))
        """Bytes of the longest token."""

    def bytes_of(self, token: int, is_first: bool) -> bytes:
        """The bytes that a token adds, without a leading space if it is the first; past the pieces: none."""
        names = self._first if is_first else self._rest
        return names[token] if token < len(names) else b""

    def text_of(self, token: int, is_first: bool) -> str:
        """The text of a token; U+FFFD where its bytes are a part of a character."""
        return self.bytes_of(token, is_first).decode(errors="replace")


@functools.lru_cache(maxsize=4)
def token_names(tokenizer: Tokenizer) -> TokenNames:
    """Made once for a tokenizer, as it takes milliseconds."""
    return TokenNames(tokenizer)


def logprob(value: float) -> float:
    """A log-probability that JSON can hold."""
    return max(value, LEAST_LOGPROB)


class Head:
    """What all events and the body of one answer begin with."""

    def __init__(self, kind: str, prefix: str, model: str, seed: int):
        self._fields = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            # The seed that draws the same answer again: OpenAI's field for what an answer depends on besides.
            "system_fingerprint": f"seed-{seed}",
        }

    def __call__(self, choices: list[dict], usage: dict | None = None, kind: str | None = None) -> dict:
        """An object with these choices."""
        fields = {**self._fields, "choices": choices}
        if kind is not None:
            fields["object"] = kind
        return fields if usage is None else {**fields, "usage": usage}


def usage(tickets: Sequence[Ticket], n: int, num_image_tokens: int) -> dict[str, Any]:
    """Numbers of tokens. `n` tickets in a row are answers to one prompt, which counts once."""
    prompts = tickets[::n]
    prompt = sum(ticket.prompt_len for ticket in prompts)
    completion = sum(ticket.num_tokens for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(ticket.cached_tokens for ticket in prompts),
            "image_tokens": sum(num_image_tokens for ticket in prompts if ticket.request.image),
        },
    }


def finish_reason(ticket: Ticket) -> str:
    """ "stop" or "length". Raises ApiError if the answer ended in another way."""
    if ticket.finish in ("stop", "length"):
        return ticket.finish
    raise ApiError(ticket.error or "the answer was stopped", status=500, code="engine_error")


# Chat


def chat_logprobs(names: TokenNames, request: Request, delivery: Delivery, position: int) -> dict[str, Any]:
    """The log-probabilities of the tokens of a delivery, the first of which is number `position` of the answer."""
    tops = delivery.top_logprobs or [TopLogprobs([], [])] * len(delivery.tokens)
    content = []
    for i, (token, value, top) in enumerate(zip(delivery.tokens, delivery.logprobs, tops, strict=True), position):
        is_first = i == 0 and not request.continues
        entry = _entry(names, token, value, is_first)
        content.append({**entry, "top_logprobs": _alternatives(names, top, is_first)})
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token: int, value: float, is_first: bool) -> dict[str, Any]:
    data = names.bytes_of(token, is_first)
    return {"token": data.decode(errors="replace"), "logprob": logprob(value), "bytes": list(data)}


def _alternatives(names: TokenNames, top: TopLogprobs, is_first: bool) -> list[dict[str, Any]]:
    return [_entry(names, token, value, is_first) for token, value in zip(top.tokens, top.logprobs, strict=True)]


# Completions


class CompletionLogprobs:
    """The log-probabilities of a completion: parallel lists, with the place of each token in the text."""

    def __init__(self, names: TokenNames, offset: int = 0, continues: bool = True):
        """`offset`: characters before the first token. `continues`: the first token keeps its leading space."""
        self._names, self._offset, self._is_first = names, offset, not continues

    def of(self, tokens: Sequence[int], values: Sequence[float | None], tops: Sequence[TopLogprobs | None]) -> dict:
        """The lists for the next tokens. None: the token has no predecessor, as the first of a prompt."""
        texts, offsets, alternatives = [], [], []
        for token, top in zip(tokens, tops, strict=True):
            text = self._names.text_of(token, self._is_first)
            texts.append(text)
            offsets.append(self._offset)
            alternatives.append(None if top is None else self._by_text(top))
            self._offset += len(text)
            self._is_first &= not self._names.bytes_of(token, False)
        return {
            "tokens": texts,
            "token_logprobs": [None if value is None else logprob(value) for value in values],
            "top_logprobs": alternatives,
            "text_offset": offsets,
        }

    def _by_text(self, top: TopLogprobs) -> dict[str, float]:
        """By the text of each token; of two that are written alike the more probable one."""
        found: dict[str, float] = {}
        for token, value in zip(top.tokens, top.logprobs, strict=True):
            found.setdefault(self._names.text_of(token, self._is_first), logprob(value))
        return found
