"""A loss or gradient norm that is not finite ends a run before that state is saved or evaluated."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sharding import is_primary_process
from sphinx_jax.errors import UserError
from sphinx_jax.training.checkpoint_store import CheckpointStore
from sphinx_jax.training.step import Metrics


class DivergenceGuard:
    """Checks the loss and gradient norm of every step, one step late, so that the device never waits for the host."""

    def __init__(self, out: Path, store: CheckpointStore):
        self._out = out
        self._store = store
        self._pending: tuple[int, Metrics, Sequence[str]] | None = None

    def record(self, step: int, metrics: Metrics, examples: Sequence[str]) -> None:
        """Record a step just dispatched, and check the previous one. Raises UserError as `check` does."""
        self.check()
        self._pending = step, metrics, examples

    def check(self) -> None:
        """Check the newest step now, before its state is saved or evaluated.

        Raises UserError that names the step, its examples (all of them in OUT/diverged.json) and the newest
        checkpoint, which precedes that step.
        """
        if self._pending is None:
            return
        step, metrics, examples = self._pending
        self._pending = None
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        diverged = next((name for name, value in values.items() if not np.isfinite(value)), None)
        if diverged is None:
            return
        report = {"step": step, **{name: str(value) for name, value in values.items()}, "examples": list(examples)}
        if is_primary_process():
            (self._out / "diverged.json").write_text(json.dumps(report, indent=2) + "\n")
        listed = ", ".join(examples[:8]) + (f" and {len(examples) - 8} more" if len(examples) > 8 else "")
        latest = self._store.latest()
        remedy = "restart with a lower --lr" if latest is None else f"lower --lr and resume from {latest} with --resume"
        raise UserError(
            f"the {'loss' if diverged == 'loss' else 'gradient norm'} is {values[diverged]} at step {step}, on "
            f"examples {listed} (all in {self._out / 'diverged.json'}); {remedy}"
        )
