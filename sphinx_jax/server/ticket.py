"""One request on its way through the server: the engine's thread appends what comes of it, the event loop reads."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from sphinx_jax.inference.requests import FinishReason, Request, TopLogprobs
from sphinx_jax.inference.sequence import Sequence as EngineSequence

PING_SECONDS = 15.0
"""A stream in which nothing happens says so this often, so that proxies keep it open."""


class Delivery(NamedTuple):
    """What is new of an answer. `tokens` may be ahead of `text`, which is held back where a stop string may begin."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


class Ticket:
    """`request` with its deliveries, and how it ended: `finish` is set once, with the last delivery."""

    def __init__(self, request: Request, prompt_len: int, wake: asyncio.Event):
        self.request, self.prompt_len, self._wake = request, prompt_len, wake
        self._deliveries: list[Delivery] = []
        self._read = 0
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.num_tokens = 0
        self.cached_tokens = 0
        """Positions of the prompt that were in the KV cache before."""
        self.submitted_at = time.perf_counter()
        self.started_at: float | None = None
        """When its prefill ended: its first token is there."""
        self.ended_at: float | None = None
        self.gave_up = False
        """Nobody waits for it any more."""

    # The engine's thread

    def deliver(self, sequence: EngineSequence, image_len: int) -> None:
        """Append what is new in `sequence`, and its end."""
        seen = self.num_tokens
        tokens, logprobs = sequence.tokens[seen:], sequence.logprobs[seen:]
        delivery = Delivery(sequence.take_text(), tokens, logprobs, sequence.top_logprobs[seen:])
        self.num_tokens = len(sequence.tokens)
        self.cached_tokens = sequence.reused + image_len if sequence.reused else 0
        if self.started_at is None and tokens:
            self.started_at = time.perf_counter()
        self._deliveries.append(delivery)
        if sequence.finish is not None:
            self.end(sequence.finish, sequence.error)

    def end(self, finish: FinishReason, error: str | None = None) -> None:
        """The terminal event: the first call counts."""
        if self.finish is None:
            self.error, self.ended_at, self.finish = error, time.perf_counter(), finish

    # The event loop

    def wake(self) -> None:
        """Tell the reader that something is new."""
        self._wake.set()

    def take(self) -> list[Delivery]:
        """The deliveries since the last call."""
        new = self._deliveries[self._read :]
        self._read += len(new)
        return new


async def deliveries(
    tickets: Sequence[Ticket], wake: asyncio.Event
) -> AsyncIterator[tuple[int, Delivery, bool] | None]:
    """(number of the ticket, what is new, whether it is the last) as it comes, until all have ended.

    None is yielded when nothing has happened for PING_SECONDS.
    """
    open_tickets = set(range(len(tickets)))
    while open_tickets:
        try:
            # Not `wait_for`: before Python 3.12 it loses a cancellation that comes in the turn of the news.
            async with asyncio.timeout(PING_SECONDS):
                await wake.wait()
        except TimeoutError:
            yield None
            continue
        wake.clear()
        for i in sorted(open_tickets):
            # Read first: what is appended after it is delivered before the end is seen.
            ended = tickets[i].finish is not None
            new = tickets[i].take()
            for delivery in new[:-1]:
                yield i, delivery, False
            if new or ended:
                yield i, new[-1] if new else Delivery("", [], [], []), ended
            if ended:
                open_tickets.discard(i)
