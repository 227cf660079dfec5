"""What a person and a program see of a run: the progress bar, metrics.jsonl, TensorBoard."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column


class RunLog:
    """Progress bar on stderr; one JSON line a logged step; TensorBoard event files where tensorboardX is installed."""

    def __init__(self, directory: Path, steps: int, *, first_step: int = 0, console: Console | None = None):
        self.console = console or Console(stderr=True)
        file = directory / "metrics.jsonl"
        # Lines of steps that a resumed run takes again would stand there twice.
        kept = [line for line in _whole_lines(file) if json.loads(line)["step"] <= first_step]
        rewritten = file.with_suffix(".partial")
        rewritten.write_text("".join(f"{line}\n" for line in kept))
        rewritten.replace(file)
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        """What was logged last, in this process or before it."""
        self._lines = file.open("a")
        self._board = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"))
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("train", total=steps, completed=first_step, said="compiling")
        self._last_time, self._last_tokens, self._tokens = time.monotonic(), 0, 0

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._lines.close()
        if self._board:
            self._board.close()

    def count(self, step: int, tokens: int) -> None:
        """One more step done, of so many sequence positions."""
        self._tokens += tokens
        self._progress.update(self._task, completed=step)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step, with the tokens a second since the last time."""
        now = time.monotonic()
        rate = (self._tokens - self._last_tokens) / max(now - self._last_time, 1e-9)
        self._last_time, self._last_tokens = now, self._tokens
        record = {"step": step, **metrics, "tokens_per_second": round(rate, 1)}
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        if self._board:
            held_out = {f"held_out/{name}": value for name, value in metrics.get("held_out", {}).items()}
            for name, value in (record | held_out).items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        said = f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}  {rate:,.0f} tokens/s"
        self._progress.update(self._task, said=said)
        if not self.console.is_terminal:
            self.console.print(f"step {step}  {said}", highlight=False)


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file that a killed process may have left in the middle of one."""
    return (
        [line[:-1] for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )
