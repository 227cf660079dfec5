"""The same scheduler in several processes: process 0 decides what comes and goes, and the others do the same.

The plan of each round goes over a TCP connection to each process, not through a collective: an idle server then waits
in `recv`, and no device spins. Every process makes the same rounds on the same requests, so their programs agree.
"""

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import NamedTuple

import jax

from sharding import broadcast_from_primary, exit_now
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.prompt_logprobs import PromptLogprobs
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.scheduler import Scheduler
from sphinx_jax.inference.sequence import Sequence as EngineSequence


class Plan(NamedTuple):
    """One round: requests that come, and the numbers of sequences that are cancelled, counted as they came."""

    submitted: list[Request]
    cancelled: list[int]


class Score(NamedTuple):
    """Not a round: the log-probabilities of a text are asked for."""

    tokens: list[int]
    adapter: str | None


class Lockstep:
    """A scheduler, and the connections to the processes that follow it. `round` is all that changes it."""

    def __init__(self, engine: Engine, scheduler: Scheduler, followers: Sequence[Connection] = ()):
        self._engine, self.scheduler, self._followers = engine, scheduler, list(followers)
        self._number_of: dict[EngineSequence, int] = {}
        self._count = 0

    def round(
        self, submitted: Sequence[Request], cancelled: Sequence[EngineSequence]
    ) -> tuple[list[EngineSequence], list[EngineSequence]]:
        """(the sequence of each request submitted, the sequences with something new or an end)."""
        self._send(Plan(list(submitted), [self._number_of[sequence] for sequence in cancelled]))
        new = [self.scheduler.submit(request, streams=True) for request in submitted]
        for sequence in new:
            self._number_of[sequence] = self._count
            self._count += 1
        for sequence in cancelled:
            self.scheduler.cancel(sequence)
        changed = [*cancelled, *self.scheduler.step()]
        for sequence in changed:
            if sequence.finish is not None:
                self._number_of.pop(sequence, None)
        return new, changed

    def prompt_logprobs(self, tokens: list[int], adapter: str | None = None) -> PromptLogprobs:
        """Log-probabilities of the tokens of a text, computed by all processes."""
        self._send(Score(tokens, adapter))
        return self._engine.prompt_logprobs(tokens, adapter)

    def close(self) -> None:
        """No more rounds: the followers return."""
        self._send(None)
        for connection in self._followers:
            connection.close()

    def _send(self, plan: Plan | Score | None) -> None:
        for connection in self._followers:
            connection.send(plan)

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Call `on_loss`, in a thread of its own, as soon as a follower is gone. Followers never send."""
        if self._followers:
            threading.Thread(target=self._watch, args=(on_loss,), name="followers", daemon=True).start()

    def _watch(self, on_loss: Callable[[], None]) -> None:
        # A connection that is closed here, at the end, cannot be waited for.
        with contextlib.suppress(OSError):
            wait(self._followers)
        on_loss()


def follow(engine: Engine, scheduler: Scheduler, leader: Connection) -> None:
    """Make the rounds of process 0 until it closes. The process ends with exit code 1 if process 0 is gone.

    A process that waits in a collective for one that is gone cannot return: only ending it helps.
    """
    plans: list[Plan | Score | None] = []
    changed = threading.Condition()

    def receive() -> None:
        while True:
            try:
                plan = leader.recv()
            except (EOFError, OSError):
                exit_now(1, "error: process 0 is gone; start all processes again")
            with changed:
                plans.append(plan)
                changed.notify()
            if plan is None:
                return

    threading.Thread(target=receive, name="leader", daemon=True).start()
    sequences: dict[int, EngineSequence] = {}
    count = 0
    while True:
        with changed:
            changed.wait_for(lambda: plans)
            plan = plans.pop(0)
        if plan is None:
            return
        if isinstance(plan, Score):
            engine.prompt_logprobs(plan.tokens, plan.adapter)
            continue
        for request in plan.submitted:
            sequences[count] = scheduler.submit(request, streams=True)
            count += 1
        for number in plan.cancelled:
            scheduler.cancel(sequences.pop(number))
        scheduler.step()
        sequences = {number: sequence for number, sequence in sequences.items() if sequence.finish is None}


def connect(host: str | None) -> list[Connection]:
    """The connections of process 0 to all others, or of another process to process 0. Call it in all processes.

    `host` is the name by which the others reach process 0; None: this host's own name.
    """
    if jax.process_count() == 1:
        return []
    if jax.process_index() > 0:
        address, key = broadcast_from_primary(lambda: ("", b""))
        return [Client(address, authkey=key)]
    # What is received is unpickled: only who knows the key, which the processes share, is heard.
    key = secrets.token_bytes(32)
    with Listener((host or socket.gethostname(), 0), backlog=jax.process_count(), authkey=key) as listener:
        broadcast_from_primary(lambda: (listener.address, key))
        return [listener.accept() for _ in range(jax.process_count() - 1)]
