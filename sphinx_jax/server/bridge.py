"""Between the event loop and the scheduler: one thread owns the model, and hands out what it makes.

The event loop submits and cancels; neither waits for the device. The thread applies what came in, steps the scheduler,
and wakes the readers. Every ticket that is accepted ends in exactly one terminal event, whatever happens.
"""

import asyncio
import collections
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, TypeVar

from sphinx_jax.errors import UserError
from sphinx_jax.inference.lockstep import Lockstep
from sphinx_jax.inference.sequence import Sequence as EngineSequence
from sphinx_jax.server.api_errors import ApiError, overloaded, unavailable
from sphinx_jax.server.ticket import Ticket
from sphinx_jax.sphinx import Sphinx

log = logging.getLogger(__name__)

T = TypeVar("T")
Status = Literal["loading", "ready", "draining", "failed"]

QUEUE_PER_SLOT = 4
"""Requests that may wait for each batch slot, unless the operator says otherwise."""

MAX_FAILURES = 3
"""Rounds in a row that fail before the server gives up."""


class Served(NamedTuple):
    """A model that is loaded and compiled, and its scheduler in all processes."""

    model: Sphinx
    lockstep: Lockstep


class Bridge:
    """`load(report)` runs in the thread that owns the model from then on; `report` takes a text on its progress."""

    def __init__(self, load: Callable[[Callable[[str], None]], Served], queue: int | None):
        self._load, self._queue = load, queue
        self.status: Status = "loading"
        self.progress = "starting"
        self.failure: BaseException | None = None
        self.served: Served | None = None
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._submitted: collections.deque[Ticket] = collections.deque()
        self._cancelled: collections.deque[Ticket] = collections.deque()
        self._calls: collections.deque[tuple[Callable[[], Any], Future]] = collections.deque()
        self._stops = False
        # The engine's thread alone:
        self._tickets: dict[EngineSequence, Ticket] = {}
        self._sequences: dict[Ticket, EngineSequence] = {}
        self._open: set[Ticket] = set()
        """Tickets that are accepted and have not ended: touched by the event loop alone."""
        self.is_idle, self.is_ready, self.has_ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.is_idle.set()
        self.on_end: Callable[[Ticket], None] = lambda ticket: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # The event loop

    @property
    def model(self) -> Sphinx:
        """The model. Raises ApiError as long as there is none."""
        self.check_accepting()
        assert self.served is not None
        return self.served.model

    def check_accepting(self) -> None:
        """Raises ApiError unless requests are taken."""
        if self.status == "loading":
            raise unavailable(f"the model is loading ({self.progress}); try again later")
        if self.status == "draining":
            raise unavailable("the server shuts down; ask another one")
        if self.status == "failed":
            raise unavailable("the model has failed; restart the server")

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def room(self) -> int:
        """Requests that may be open at a time: one in each batch slot, and those that wait."""
        assert self.served is not None
        num_seqs = self.served.lockstep.scheduler.shape.num_seqs
        return num_seqs + (QUEUE_PER_SLOT * num_seqs if self._queue is None else self._queue)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue tickets, all of them or none. Raises ApiError if the queue is full or nothing is taken."""
        self.check_accepting()
        if len(self._open) + len(tickets) > self.room:
            raise overloaded(f"the queue is full ({len(self._open)} requests); try again in a moment")
        self._open.update(tickets)
        self.is_idle.clear()
        with self._changed:
            self._submitted.extend(tickets)
            self._changed.notify()

    def give_up(self, tickets: Iterable[Ticket]) -> None:
        """Nobody waits for these tickets any more: their batch slots are free within one round."""
        left = [ticket for ticket in tickets if ticket in self._open and not ticket.gave_up]
        for ticket in left:
            ticket.gave_up = True
        if left:
            with self._changed:
                self._cancelled.extend(left)
                self._changed.notify()

    async def call(self, function: Callable[[], T]) -> T:
        """`function()` in the thread that owns the model, between two rounds."""
        self.check_accepting()
        future: Future = Future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def drain(self) -> None:
        """Take no more requests; those that are accepted go on."""
        if self.status in ("loading", "ready"):
            self.status = "draining"

    def cut_short(self, reason: str) -> None:
        """End every ticket now, with an error."""
        for ticket in list(self._open):
            ticket.end("error", reason)
        self.give_up(self._open)
        self._wake(list(self._open))

    def lose(self, reason: str) -> None:
        """End everything: called from any thread when the model cannot go on. The engine's thread may hang."""
        self.failure = RuntimeError(reason)
        self._in_loop(self._fail, reason)

    def stop(self, seconds: float) -> bool:
        """End the thread; whether it did within `seconds`."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _wake(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket.finish is not None and ticket in self._open:
                self._open.discard(ticket)
                self.on_end(ticket)
            ticket.wake()
        if not self._open:
            self.is_idle.set()

    def _set_ready(self) -> None:
        # A server that drains while it loads stays draining.
        if self.status == "loading":
            self.status = "ready"
        self.is_ready.set()

    def _fail(self, reason: str) -> None:
        """Nothing is accepted any more, and what was accepted ends: in one callback, so that nothing comes between."""
        self.status = "failed"
        for ticket in self._open:
            ticket.end("error", reason)
        self._wake(list(self._open))
        for _, future in _taken(self._calls):
            future.set_exception(ApiError(reason, status=500, code="engine_error"))
        self.has_ended.set()

    # The engine's thread

    def _run(self) -> None:
        try:
            self.served = self._load(self._report)
            self.served.lockstep.watch(self._on_loss)
            self._in_loop(self._set_ready)
            self._serve(self.served)
        except BaseException as error:
            if not isinstance(error, UserError):
                log.exception("the engine has failed")
            self.failure = error
            self._in_loop(self._fail, f"the engine has failed: {type(error).__name__}")

    def _on_loss(self) -> None:
        if not self._stops:
            self.lose("a process of the server is gone")

    def _report(self, progress: str) -> None:
        self.progress = progress

    def _serve(self, served: Served) -> None:
        """Rounds, as long as there is work; otherwise wait for some."""
        lockstep, failures = served.lockstep, 0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._submitted or self._cancelled or self._calls or self._stops or lockstep.scheduler.has_work
                    )
                )
                submitted, cancelled, calls = _taken(self._submitted), _taken(self._cancelled), _taken(self._calls)
            if self._stops:
                lockstep.close()
                return
            for function, future in calls:
                _answer(function, future)
            failures = failures + 1 if self._round(served, submitted, cancelled) else 0
            if failures >= MAX_FAILURES:
                raise RuntimeError(f"{MAX_FAILURES} rounds in a row have failed on the device")

    def _round(self, served: Served, submitted: list[Ticket], cancelled: list[Ticket]) -> bool:
        """One round of the scheduler, and what came of it to the readers; whether the device failed."""
        gone = [self._sequences[ticket] for ticket in cancelled if ticket in self._sequences]
        # What was given up before it came to the scheduler never does. Looked up once: it may be given up meanwhile.
        heard, unheard = [], []
        for ticket in submitted:
            (unheard if ticket.gave_up else heard).append(ticket)
        for ticket in unheard:
            ticket.end("cancelled")
        new, changed = served.lockstep.round([ticket.request for ticket in heard], gone)
        for ticket, sequence in zip(heard, new, strict=True):
            self._tickets[sequence], self._sequences[ticket] = ticket, sequence
        touched = [self._tickets[sequence] for sequence in changed if sequence in self._tickets]
        for sequence in changed:
            self._deliver(served, sequence)
        self._in_loop(self._wake, [*unheard, *touched])
        return any(ticket.finish == "error" for ticket in touched)

    def _deliver(self, served: Served, sequence: EngineSequence) -> None:
        ticket = self._tickets.get(sequence)
        if ticket is None:
            return
        ticket.deliver(sequence, served.model.config.num_image_tokens if sequence.request.image else 0)
        if sequence.finish is not None:
            del self._tickets[sequence], self._sequences[ticket]

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        """Call `function` in the event loop. After the loop has closed nobody is left to tell."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("the event loop has closed")


def _taken(waiting: collections.deque[T]) -> list[T]:
    """All of it, and none of it is left."""
    taken = list(waiting)
    waiting.clear()
    return taken


def _answer(function: Callable[[], Any], future: Future) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
