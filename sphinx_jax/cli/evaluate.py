"""Evaluate a model on benchmarks: one command, answers that can be read, numbers by the official definitions.

Examples:
  python evaluate.py                                    easy-vqa's test set, of the newest run or the small model
  python evaluate.py --checkpoint SPHINX-MoE --mesh.tensor 8 --data /data/eval --out results/moe
  python evaluate.py --checkpoint SPHINX-MoE --data /data/eval --tasks mme,pope,refcoco_val --limit 200
  python evaluate.py --list --data /data/eval           what is there and what is missing; no model is loaded
  python evaluate.py --score results/moe                score the answers again; no model is loaded

Every answer is a line of OUT/TASK.jsonl as soon as it ends. Stopped and started again, it goes on where it was.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ImageFile
from rich.console import Console

import sharding
from sharding import is_primary_process
from sphinx_jax import Sphinx
from sphinx_jax.cli import common
from sphinx_jax.cli.evaluate_options import Options
from sphinx_jax.cli.model_options import load_model, remark, start_process
from sphinx_jax.cli.progress import show_progress
from sphinx_jax.evaluation import expert_load
from sphinx_jax.evaluation.data_folder import DataFolder
from sphinx_jax.evaluation.records import Record
from sphinx_jax.evaluation.report import write_report
from sphinx_jax.evaluation.report_images import Images
from sphinx_jax.evaluation.results import read_run, score_folder, write_results
from sphinx_jax.evaluation.run import Asking, answer_task
from sphinx_jax.evaluation.settings import model_settings, options_used, prepare_folder, run_description
from sphinx_jax.evaluation.tables import Result, terminal_table
from sphinx_jax.evaluation.tasks import TASKS, choose
from sphinx_jax.inference.batch_file import Progress

_WIDTH = 160
"""Columns of the table where no terminal is."""


def main(argv: Sequence[str]) -> int:
    """Answer the questions of the tasks and print their values; the exit code is 1 if a task has an error."""
    start = time.perf_counter()
    options = common.parse(Options, argv, "evaluate.py", __doc__ or "")
    options.check()
    data = DataFolder(options.data) if options.data else None
    if options.list:
        list_tasks(data)
        return 0
    if options.score:
        return score(options.score, options.report)
    start_process(options)
    ImageFile.LOAD_TRUNCATED_IMAGES = options.lenient_images
    # The primary process alone has the records, which may hold images.
    records: dict[str, list[Record]] = {}
    names = sharding.broadcast_from_primary(lambda: read_records(options, data, records))
    model = load_model(options)
    out = options.out or Path("results") / (model.path.name if model.path else "model")
    settings = sharding.broadcast_from_primary(lambda: folder_settings(model, options, out))
    asking = Asking(options.sampling, data, options.max_num_seqs, options.prefix_bytes)
    loaded = time.perf_counter()
    totals = Progress(0)
    for name in names:
        task = TASKS[name]
        done = show_progress(answer_task(model, task, records.get(name, []), out, asking, settings), name)
        totals.skipped += done.skipped
        totals.answered += done.answered
        totals.tokens += done.tokens
    seconds = time.perf_counter() - loaded
    remark(
        f"loaded after {loaded - start:.1f} s, {totals.answered:,} questions answered in {seconds:.1f} s, "
        f"{totals.skipped:,} answered before: {out}"
    )
    images = Images(data, records)
    if options.report:
        expert_load.measure(model, [TASKS[name] for name in names], out, images)
    if not is_primary_process():
        return 0
    run = {
        **run_description(model),
        "options": options_used(options),
        "settings": settings,
        "answered": totals.answered,
        "answered_before": totals.skipped,
        "seconds": round(seconds, 2),
        "tokens": totals.tokens,
        "tokens_per_second": round(totals.tokens / seconds, 1),
    }
    results = score_folder(out)
    if options.report:
        write_report(out, results, run, images)
    return show(out, results, run)


def score(out: Path, report: bool) -> int:
    """Score the answers of an earlier evaluation again."""
    results, run = score_folder(out), read_run(out)
    if report:
        folder = run.get("options", {}).get("data")
        data = DataFolder(Path(folder)) if folder and Path(folder).is_dir() else None
        write_report(out, results, run, Images(data))
    return show(out, results, run)


def read_records(options: Options, data: DataFolder | None, records: dict[str, list[Record]]) -> list[str]:
    """Read the records of all chosen tasks into `records`; returns the tasks' names."""
    for task in choose(options.task_names, data):
        found, dropped = task.records(data, options.keep_duplicates)
        records[task.name] = task.first(found, options.limit)
        if dropped:
            remark(f"{task.name}: {dropped:,} duplicates left out (--keep-duplicates asks them too)")
    return list(records)


def folder_settings(model: Sphinx, options: Options, out: Path) -> dict[str, Any]:
    """What decides the answers, recorded in the folder `out`."""
    settings = model_settings(model, options.sampling)
    prepare_folder(out, settings)
    return settings


def show(out: Path, results: Mapping[str, Result], run: Mapping[str, Any]) -> int:
    """Write the results and print their table; the exit code is 1 on an error."""
    write_results(out, results, run)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, emoji=False)
    console.print(terminal_table(results))
    return int(any(result.error for result in results.values()))


def list_tasks(data: DataFolder | None) -> None:
    """Print the tasks: those whose files are there, and what is missing of the others."""
    for task in TASKS.values():
        found = task.source(data)
        state = ", ".join(map(str, found[1])) or "comes with its package" if found else task.missing(data)
        print(f"{'+' if found else '-'} {task.name:18} {state}")
