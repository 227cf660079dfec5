"""The file OUT/<task>.jsonl: a line a question as it ends, with all that is needed to score it again.

    {"n": 3, "id": null, "image": "cat.jpg", "question": "...", "prompt": "...", "truth": ["yes"], "extra": {},
     "answer": "Yes", "score": 1.0, "matched": "yes", "tokens": 2, "logprob": -0.02, "finish": "stop"}

`n` is the record's number in its file, `truth` all accepted answers, `matched` what the metric read the answer as,
`logprob` the log-probability of the whole answer. A question that could not be asked, as its image is missing, has
"error" in place of the last six.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sphinx_jax.errors import UserError
from sphinx_jax.evaluation.records import Record
from sphinx_jax.evaluation.tasks import Task
from sphinx_jax.inference.requests import Completion


def answers_file(out: Path, task: Task) -> Path:
    """The file of a task's answers in the folder `out`."""
    return out / f"{task.name}.jsonl"


def line_of(task: Task, record: Record, result: Completion | UserError) -> dict[str, Any]:
    """The line of a question that has ended."""
    line: dict[str, Any] = {
        "n": record.number,
        "id": record.question_id,
        "image": image_name(record),
        "question": record.question,
        "prompt": task.prompt(record),
        "truth": list(record.truths),
        "extra": dict(record.extra),
    }
    if isinstance(result, UserError):
        return line | {"error": str(result)}
    answer = result.text.rstrip()
    return line | {
        "answer": answer,
        **scored(task, record, answer),
        "tokens": len(result.tokens),
        "logprob": round(sum(result.logprobs), 6),
        "finish": result.finish,
    }


def scored(task: Task, record: Record, answer: str) -> dict[str, Any]:
    """The score of an answer, and what it was read as; of a task without a metric, nothing."""
    if task.metric is None:
        return {"score": None, "matched": None}
    score = task.metric.score(answer, record)
    return {"score": score.value, "matched": score.matched}


def image_name(record: Record) -> str | None:
    """How the image of a record is called: its path, or the number of the row that holds it."""
    return f"row {record.number}" if isinstance(record.image, bytes) else record.image


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a task, by number. A last line that is cut short is left out. Raises UserError on anything else."""
    lines: dict[int, dict[str, Any]] = {}
    texts = file.read_bytes().splitlines(keepends=True)
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines[int(line["n"])] = line
        except (ValueError, KeyError, TypeError) as error:
            if number < len(texts) or text.endswith(b"\n"):
                raise UserError(f"{file}: line {number} is no answer of evaluate.py; choose another folder") from error
    return [lines[n] for n in sorted(lines)]


def record_of(line: Mapping[str, Any]) -> Record:
    """The record of a line."""
    return Record(line["n"], line["image"], line["question"], tuple(line["truth"]), line["id"], line["extra"])
