"""A loss or gradient that is not finite ends a run before anything is saved of it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sharding import is_primary_process
from sphinx_jax.errors import UserError
from sphinx_jax.training.step import Metrics
from sphinx_jax.training.train_state import StateStore


class DivergenceGuard:
    """Looks at every step's loss and gradient norm, one step late, so that the device never waits for it."""

    def __init__(self, out: Path, store: StateStore):
        self._out = out
        self._store = store
        self._last: tuple[int, Metrics, Sequence[str]] | None = None

    def follow(self, step: int, metrics: Metrics, examples: Sequence[str]) -> None:
        """Remember a step just dispatched, and check the one before. Raises UserError as `settle` does."""
        self.settle()
        self._last = step, metrics, examples

    def settle(self) -> None:
        """Check the newest step now, before its state is saved or judged.

        Raises UserError that names the step, its examples (all of them in OUT/diverged.json) and the newest
        checkpoint, which is from before that step.
        """
        if self._last is None:
            return
        step, metrics, examples = self._last
        self._last = None
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        wrong = next((name for name, value in values.items() if not np.isfinite(value)), None)
        if wrong is None:
            return
        report = {"step": step, **{name: str(value) for name, value in values.items()}, "examples": list(examples)}
        if is_primary_process():
            (self._out / "diverged.json").write_text(json.dumps(report, indent=2) + "\n")
        some = ", ".join(examples[:8]) + (f" and {len(examples) - 8} more" if len(examples) > 8 else "")
        good = self._store.newest()
        remedy = "start again with a lower --lr" if good is None else f"lower --lr and go on from {good} with --resume"
        raise UserError(
            f"the {'loss' if wrong == 'loss' else 'gradient norm'} is {values[wrong]} at step {step}, whose examples "
            f"are {some} (all in {self._out / 'diverged.json'}); {remedy}"
        )
