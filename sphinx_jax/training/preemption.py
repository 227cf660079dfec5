"""Preemption: after SIGTERM the current step finishes and its state is saved."""

import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils


class PreemptionGuard:
    """While entered, SIGTERM sets `requested` instead of ending the process. Enter it in the main thread."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "PreemptionGuard":
        self._previous_handler = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous_handler)

    def _request(self, _: int, __: FrameType | None) -> None:
        self.requested = True


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag, reduced by logical or over all processes, which must call this at the same step.

    Signals and clocks differ between processes, and what they do next must not.
    """
    if jax.process_count() == 1:
        return flags
    return tuple(multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist())
