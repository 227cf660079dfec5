"""What the devices do in some steps of a run, recorded for TensorBoard's profiler or Perfetto."""

from pathlib import Path

import jax


class StepProfile:
    """Records the steps in `steps` into `directory`; each is marked "train" with its number."""

    def __init__(self, directory: Path, steps: range):
        self._directory = directory
        self._steps = steps
        self._running = False

    def before(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """To be entered around the step."""
        # A run resumed in the middle records the rest.
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, result: object) -> None:
        """Ends the recording where `step` is the last of it, when its `result` is there."""
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._running = False
