"""Preemption: after SIGTERM the current step finishes and its state is saved."""

import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils


class PreemptionGuard:
    """While entered, SIGTERM requests a stop instead of ending the process. Enter it in the main thread.

    With several processes `jax.distributed` handles the signal: its coordination service tells all of them to stop at
    the same step, without a collective per step. After the last step they ignore it.
    """

    def __init__(self) -> None:
        self._stop = False
        self._num_calls = 0

    def __enter__(self) -> "PreemptionGuard":
        if jax.process_count() == 1:
            self._previous_handler = signal.signal(signal.SIGTERM, self._request_stop)
        return self

    def __exit__(self, *_: object) -> None:
        # jax's service would tell all processes, and wait three minutes for those that have already left it.
        signal.signal(signal.SIGTERM, self._previous_handler if jax.process_count() == 1 else signal.SIG_IGN)

    def _request_stop(self, _: int, __: FrameType | None) -> None:
        self._stop = True

    def should_stop(self) -> bool:
        """Whether to stop now: the same answer in all processes, which must call this equally often."""
        self._num_calls += 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._num_calls):
            self._stop = True
        return self._stop


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; all must call this at the same step. Waits for the device."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())
