"""From the lines of a task to its value, and from all tasks of a folder to results.json and tables.

Values come from the lines alone, whatever their order: a folder can be scored again without the model and the data.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx_jax.errors import UserError
from sphinx_jax.evaluation.lines import answers_file, read_lines, record_of, scored
from sphinx_jax.evaluation.records import Metric, Score
from sphinx_jax.evaluation.submissions import submission
from sphinx_jax.evaluation.tables import Result, markdown_table
from sphinx_jax.evaluation.tasks import TASKS, Task
from sphinx_jax.inference.answers_file import run_file, write_whole

RESULTS = "results.json"

MOST_FAILED = 0.01
"""The fraction of questions that may fail, as their image is missing: above it a task has an error and no value."""


def result_of(task: Task, lines: Sequence[Mapping[str, Any]], expected: int) -> Result:
    """The value of a task, of `expected` questions, of which some may have no line yet."""
    failed = [line["error"] for line in lines if "error" in line]
    metric, missing = task.metric, expected - len(lines)
    if metric is None:
        return Result(None, "", None, len(lines), 0, len(failed), {}, None, missing, _error(failed, lines))
    scores = [_score(metric, line) for line in lines]
    unmatched = sum(score.matched is None for score in scores) - len(failed)
    result = Result(metric.name, metric.unit, None, len(lines), unmatched, len(failed), {}, None, missing)
    error = _error(failed, lines)
    if error or not lines:
        return dataclasses.replace(result, error=error or "no question has ended yet")
    records = [record_of(line) for line in lines]
    value, parts = metric.aggregate(records, scores)
    original = metric.original
    if original is not None:
        theirs = original.aggregate(records, [_score(original, line) for line in lines]).value
        result = dataclasses.replace(result, original=round(theirs, 4))
    return dataclasses.replace(
        result, value=round(value, 4), parts={name: round(part, 4) for name, part in parts.items()}
    )


def _score(metric: Metric, line: Mapping[str, Any]) -> Score:
    return Score(0.0, None) if "error" in line else metric.score(line["answer"], record_of(line))


def _error(failed: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str | None:
    if len(failed) <= MOST_FAILED * len(lines):
        return None
    return f"{len(failed)} of {len(lines)} questions could not be asked, the first: {failed[0]}"


# A folder of results


def tasks_in(out: Path) -> list[Task]:
    """The tasks that have answers in a folder, in the order of the table."""
    return [task for task in TASKS.values() if answers_file(out, task).is_file()]


def score_folder(out: Path) -> dict[str, Result]:
    """The result of each task that has answers in `out`. Scores in the lines are brought up to date, and the files of
    answers for benchmarks' servers are written.

    Raises UserError if there are no answers.
    """
    results = {}
    for task in tasks_in(out):
        file = answers_file(out, task)
        lines = read_lines(file)
        _rescore(task, file, lines)
        result = results[task.name] = result_of(task, lines, max(_num_questions(file), len(lines)))
        if task.submission and not result.missing:
            name, data = submission(task, lines)
            write_whole(out / name, data)
    if not results:
        raise UserError(f"{out}: holds no answers of evaluate.py; give the folder of an evaluation")
    return results


def _rescore(task: Task, file: Path, lines: list[dict[str, Any]]) -> None:
    """Write the lines again if the metric now scores one of them differently."""
    new = [line if "error" in line else line | scored(task, record_of(line), line["answer"]) for line in lines]
    if new != lines:
        write_whole(file, b"".join(json.dumps(line).encode() + b"\n" for line in new))


def _num_questions(file: Path) -> int:
    """How many questions belong to a file of answers."""
    try:
        return len(json.loads(run_file(file).read_bytes())["questions"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def write_results(out: Path, results: Mapping[str, Result], run: Mapping[str, Any]) -> None:
    """results.json, with the tasks and how they were run, and results.md, their table."""
    content = {"tasks": {name: result.as_json() for name, result in results.items()}, "run": dict(run)}
    write_whole(out / RESULTS, (json.dumps(content, indent=1) + "\n").encode())
    write_whole(out / "results.md", markdown_table(results).encode())


def read_run(out: Path) -> dict[str, Any]:
    """The entry "run" of an earlier results.json; empty if there is none."""
    try:
        return dict(json.loads((out / RESULTS).read_bytes())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
