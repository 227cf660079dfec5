"""Checkpoints of a run: written in the background, restored on any mesh."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from sharding import fail, fail_with
from sphinx_jax.checkpoints.writer import why_not_written
from sphinx_jax.errors import UserError
from sphinx_jax.training.step import TrainState


class CheckpointStore:
    """Checkpoints of a run in `directory`/STEP, written asynchronously and renamed into place once complete.

    Preserves the newest `keep_last`, and the `keep_best` with the highest scores. Every method that waits for a save
    raises UserError if the directory could not be written; one process of several ends as soon as it could not.
    """

    def __init__(self, directory: Path, keep_last: int = 2, keep_best: int = 1):
        newest = checkpoint_managers.LatestN(n=keep_last)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["score"], n=keep_best, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                # Incomplete checkpoints of a killed process.
                cleanup_tmp_directories=True,
            ),
        )
        self._directory = directory.absolute()
        self._failed_save = _FailedSave(self._directory)
        if jax.process_count() > 1:
            logging.getLogger("absl").addHandler(self._failed_save)

    def save(self, state: TrainState, data_position: dict[str, Any], score: float | None = None) -> None:
        """Save the state and the position of the data iterator; `score`: held-out accuracy, higher is better."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position))
        with self._explained():
            self._manager.save(step, args=args, metrics=None if score is None else {"score": score})

    def latest(self) -> Path | None:
        """The newest complete checkpoint, after waiting for a save in progress."""
        with self._explained():
            self._manager.wait_until_finished()
        step = self._manager.latest_step()
        return None if step is None else Path(self._manager.directory) / str(step)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint with the shardings of `abstract`, whatever mesh wrote it; None if there is none yet."""
        step = self._manager.latest_step()
        if step is None:
            return None
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()),
        )
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Wait for the last save to complete."""
        with self._explained():
            self._manager.wait_until_finished()
            self._manager.close()
        logging.getLogger("absl").removeHandler(self._failed_save)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if reason := _why_not_written(error):
                raise UserError(_refusal(self._directory, reason)) from error
            raise


class _FailedSave(logging.Handler):
    """Ends one of several processes when Orbax logs that its thread which writes a checkpoint has failed.

    Orbax hands the error on only after a barrier of all processes: the others wait there for the files of this one,
    and this one for them, ten minutes long. Its log is where the error can be seen at once.
    """

    def __init__(self, directory: Path):
        super().__init__(logging.ERROR)
        self._directory = directory

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, Exception) and threading.current_thread().name == "async_save":
            if reason := _why_not_written(error):
                fail(2, f"error: {_refusal(self._directory, reason)}")
            fail_with(error)


def _why_not_written(error: Exception) -> str | None:
    # Orbax's word for a process that did not come to its barrier.
    return None if isinstance(error, TimeoutError) and error.errno is None else why_not_written(error)


def _refusal(directory: Path, reason: str) -> str:
    return f"{directory}: cannot write a checkpoint ({reason}); make room, and continue with --resume"
