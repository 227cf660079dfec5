"""What a person and a program see of a run: the progress bar, metrics.jsonl, TensorBoard."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from sharding import is_primary_process


class RunLog:
    """Progress bar on stderr; one JSON line a logged step; TensorBoard event files where tensorboardX is installed.

    Of several processes only the first says and writes anything.
    """

    def __init__(
        self,
        directory: Path,
        steps: int,
        *,
        first_step: int = 0,
        peak_flops: float | None = None,
        console: Console | None = None,
    ):
        """`peak_flops` is what the devices could do in a second, if that is known."""
        self.console = console or Console(stderr=True, quiet=not is_primary_process())
        file = directory / "metrics.jsonl"
        # Lines of steps that a resumed run takes again would stand there twice.
        kept = [line for line in _whole_lines(file) if json.loads(line)["step"] <= first_step]
        if is_primary_process():
            rewritten = file.with_suffix(".partial")
            rewritten.write_text("".join(f"{line}\n" for line in kept))
            rewritten.replace(file)
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        """What was logged last, in this process or before it."""
        self._lines = file.open("a") if is_primary_process() else None
        self._board = None
        if is_primary_process() and importlib.util.find_spec("tensorboardX"):
            self._board = _board_writer(directory / "tensorboard")
        whole = lambda width: Column(no_wrap=True, min_width=width)
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=whole(6 + 2 * len(str(steps)))),
            BarColumn(bar_width=10),
            TimeElapsedColumn(table_column=whole(7)),
            TextColumn("left", table_column=whole(4)),
            TimeRemainingColumn(table_column=whole(7)),
            # Last and elastic: a narrow terminal cuts off its end.
            TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True, ratio=1)),
            console=self.console,
            speed_estimate_period=120,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=steps, completed=first_step, said="compiling")
        self._peak_flops = peak_flops
        self._start_counting()

    def _start_counting(self) -> None:
        self._last_time = time.monotonic()
        self._tokens, self._images, self._flops = 0, 0, 0.0

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._lines:
            self._lines.close()
        if self._board:
            self._board.close()

    def count(self, step: int, tokens: int, images: int, flops: float) -> None:
        """One more step done, of so many sequence positions, pictures and operations."""
        self._tokens += tokens
        self._images += images
        self._flops += flops
        self._progress.update(self._task, completed=step)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step, with what was done a second since the last time, and the memory in use."""
        seconds = max(time.monotonic() - self._last_time, 1e-9)
        tokens, images = self._tokens / seconds, self._images / seconds
        mfu = self._flops / seconds / self._peak_flops if self._peak_flops else None
        self._start_counting()
        record = {"step": step, **metrics, "tokens_per_second": round(tokens, 1), "images_per_second": round(images, 1)}
        if mfu is not None:
            record["mfu"] = round(mfu, 4)
        # A CPU does not say.
        memory = jax.local_devices()[0].memory_stats()
        if memory:
            record["memory_bytes"] = memory["peak_bytes_in_use"]
        if self._lines:
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        if self._board:
            held_out = {f"held_out/{name}": value for name, value in metrics.get("held_out", {}).items()}
            for name, value in (record | held_out).items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        said = f"loss {metrics['loss']:.4f}  {tokens:,.0f} tokens/s"
        said += f"  {images:,.0f} images/s" if images else ""
        said += "" if mfu is None else f"  MFU {mfu:.1%}"
        said += f"  accuracy {metrics['accuracy']:.3f}  balance {metrics['balance_loss']:.3f}"
        said += f"  grad {metrics['grad_norm']:.2g}  lr {metrics['lr']:.2g}"
        said += f"  memory {memory['peak_bytes_in_use'] / 2**30:.1f} GiB" if memory else ""
        held_out = "".join(f"  {name} {value:.3f}" for name, value in metrics.get("held_out", {}).items())
        said += f"  held out:{held_out}" if held_out else ""
        self._progress.update(self._task, said=said)
        if not self.console.is_terminal:
            self.console.print(f"step {step}  {said}", highlight=False, soft_wrap=True)


def _board_writer(directory: Path) -> Any:
    """TensorBoard's event files, by tensorboardX.

    It would import torch wherever that is installed, to draw its tensors: a second of every start, and memory.
    """
    loaded = "torch" in sys.modules
    if not loaded:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if not loaded:
            del sys.modules["torch"]
    return SummaryWriter(str(directory))


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file that a killed process may have left in the middle of one."""
    return (
        [line[:-1] for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )
