"""A profile of some steps of a run, for TensorBoard's profiler or Perfetto."""

from pathlib import Path

import jax

from sphinx_jax.errors import UserError


def parse_steps(text: str | None) -> range:
    """The steps of FIRST:LAST, none by default. Raises UserError on another form."""
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile {text}: must be FIRST:LAST, two steps, such as 20:22")
    return range(int(first), int(last) + 1)


class StepProfile:
    """Traces the steps in `steps` into `directory`; each is annotated "train" with its number."""

    def __init__(self, directory: Path, steps: range):
        self._directory = directory
        self._steps = steps
        self._tracing = False

    def before(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Start the trace at its first step; the context to run the step in."""
        # A run resumed within the range traces the rest of it.
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, result: object) -> None:
        """Stop the trace after its last step, once that step's `result` is computed."""
        if self._tracing and step + 1 not in self._steps:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._tracing = False
