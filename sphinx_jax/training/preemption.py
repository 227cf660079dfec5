"""Being told to stop: SIGTERM lets the step under way finish and its state be saved."""

import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils


class PreemptionGuard:
    """While entered, SIGTERM sets `asked` instead of ending the process. Enter it in the main thread."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "PreemptionGuard":
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.asked = True


def in_any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag, set if any process has it set: all processes must call this at the same step.

    Signals and clocks differ between processes, and what they do next must not.
    """
    if jax.process_count() == 1:
        return flags
    return tuple(multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist())
