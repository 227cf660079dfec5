"""Logging of a run: the progress bar, metrics.jsonl, TensorBoard."""

import contextlib
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
from sphinx_jax.errors import UserError


class RunLog:
    """Progress bar on stderr; one JSON line per logged step; TensorBoard event files where tensorboardX is installed.

    Of several processes only the primary one prints and writes.
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
        """`peak_flops`: peak FLOP/s of all devices together, None where unknown."""
        self.console = console or Console(stderr=True, quiet=not is_primary_process(), markup=False, emoji=False)
        file = directory / "metrics.jsonl"
        # A resumed run repeats the steps after its checkpoint: drop their lines.
        kept = [line for line in _complete_lines(file) if json.loads(line)["step"] <= first_step]
        if is_primary_process():
            rewritten = file.with_suffix(".partial")
            rewritten.write_text("".join(f"{line}\n" for line in kept))
            rewritten.replace(file)
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        """The last logged record, of this process or of the run it resumed."""
        self._lines = file.open("a") if is_primary_process() else None
        self._tensorboard = None
        if is_primary_process() and importlib.util.find_spec("tensorboardX"):
            self._tensorboard = _tensorboard_writer(directory / "tensorboard")
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=_column(6 + 2 * len(str(steps)))),
            BarColumn(bar_width=10),
            TimeElapsedColumn(table_column=_column(7)),
            TextColumn("left", table_column=_column(4)),
            TimeRemainingColumn(table_column=_column(7)),
            # Last and elastic: a narrow terminal truncates it.
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            console=self.console,
            speed_estimate_period=120,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=steps, completed=first_step, status="compiling")
        self._peak_flops = peak_flops
        self._reset_counters()

    def _reset_counters(self) -> None:
        self._last_time = time.monotonic()
        self._num_tokens, self._num_images, self._flops = 0, 0, 0.0

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        # Files that cannot be written must not hide the error that ends the run.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            if self._lines:
                self._lines.close()
            if self._tensorboard:
                self._tensorboard.close()

    def count(self, step: int, num_tokens: int, num_images: int, flops: float) -> None:
        """Add a finished step's tokens, images and FLOPs to the throughput counters."""
        self._num_tokens += num_tokens
        self._num_images += num_images
        self._flops += flops
        self._progress.update(self._task, completed=step)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Log the metrics of a step, with the throughput since the last logged step and the peak memory.

        Raises UserError if metrics.jsonl cannot be written.
        """
        seconds = max(time.monotonic() - self._last_time, 1e-9)
        tokens_per_second, images_per_second = self._num_tokens / seconds, self._num_images / seconds
        mfu = self._flops / seconds / self._peak_flops if self._peak_flops else None
        self._reset_counters()
        record = {"step": step, **metrics}
        record |= {"tokens_per_second": round(tokens_per_second, 1), "images_per_second": round(images_per_second, 1)}
        if mfu is not None:
            record["mfu"] = round(mfu, 4)
        # None on a CPU.
        memory = jax.local_devices()[0].memory_stats()
        if memory:
            record["memory_bytes"] = memory["peak_bytes_in_use"]
        if self._lines:
            try:
                self._lines.write(json.dumps(record) + "\n")
                self._lines.flush()
            except OSError as error:
                raise UserError(
                    f"{self._lines.name}: cannot write ({error.strerror}); make room, and continue with --resume"
                ) from error
        if self._tensorboard:
            held_out = {f"held_out/{name}": value for name, value in metrics.get("held_out", {}).items()}
            for name, value in (record | held_out).items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(name, value, step)
        status = f"loss {metrics['loss']:.4f}  {tokens_per_second:,.0f} tokens/s"
        status += f"  {images_per_second:,.0f} images/s" if images_per_second else ""
        status += "" if mfu is None else f"  MFU {mfu:.1%}"
        status += f"  accuracy {metrics['accuracy']:.3f}  balance {metrics['balance_loss']:.3f}"
        status += f"  grad {metrics['grad_norm']:.2g}  lr {metrics['lr']:.2g}"
        status += f"  memory {memory['peak_bytes_in_use'] / 2**30:.1f} GiB" if memory else ""
        accuracies = {name: value for name, value in metrics.get("held_out", {}).items() if value is not None}
        held_out = "".join(f"  {name} {value:.3f}" for name, value in accuracies.items())
        status += f"  held out:{held_out}" if held_out else ""
        self._progress.update(self._task, status=status)
        if not self.console.is_terminal:
            self.console.print(f"step {step}  {status}", highlight=False, soft_wrap=True, markup=False)


def _tensorboard_writer(directory: Path) -> Any:
    """tensorboardX's writer of event files.

    tensorboardX imports torch where it is installed, to accept its tensors; that costs a second and memory, so the
    import is blocked.
    """
    loaded = "torch" in sys.modules
    if not loaded:
        # None makes the import statement raise ImportError.
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if not loaded:
            del sys.modules["torch"]
    return SummaryWriter(str(directory))


def _complete_lines(file: Path) -> list[str]:
    """The complete lines of a file: a killed process may have left the last one incomplete."""
    if not file.exists():
        return []
    return [line[:-1] for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _column(width: int) -> Column:
    """A column of the progress bar that is never truncated."""
    return Column(no_wrap=True, min_width=width)
