"""A progress bar on standard error, of the primary process."""

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from sharding import is_primary_process
from sphinx_jax.inference.batch_file import Progress


def show_progress(progress: Iterator[Progress], title: str = "") -> Progress:
    """Draw the progress until it ends; returns the last."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    done = Progress(0)
    with ProgressBar(*columns, console=Console(stderr=True, quiet=not is_primary_process())) as bar:
        task = bar.add_task(title, total=None, speed=0.0)
        for done in progress:
            completed = done.skipped + done.answered + done.failed
            bar.update(task, total=done.total, completed=completed, speed=done.tokens / (time.perf_counter() - start))
    return done
