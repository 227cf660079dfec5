"""Answers of test splits in the formats of the benchmarks' servers."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sphinx_jax.evaluation.tasks import SubmissionFormat, Task

Lines = Sequence[Mapping[str, Any]]


def submission(task: Task, lines: Lines) -> tuple[str, bytes]:
    """Name and content of the file for the task's server. A question without an answer gets an empty one."""
    assert task.submission is not None
    suffix, write = _FORMATS[task.submission]
    return f"{task.name}_submission.{suffix}", write(lines).encode()


def _json(fields: Mapping[str, str]) -> Callable[[Lines], str]:
    """A JSON list of objects, whose fields are those of the lines under other names."""
    return lambda lines: json.dumps([{name: line.get(key, "") for name, key in fields.items()} for line in lines])


def _table(lines: Lines) -> str:
    """A table with tabs: the columns of MMBench's own, without images, and `prediction`."""
    letters = sorted({letter for line in lines for letter in line["extra"]["options"]})
    text = io.StringIO()
    rows = csv.DictWriter(text, ["index", "question", *letters, "prediction"], delimiter="\t", lineterminator="\n")
    rows.writeheader()
    for line in lines:
        extra = line["extra"]
        row = {"index": extra["index"], "question": extra["question"], "prediction": line.get("answer", "")}
        rows.writerow(row | extra["options"])
    return text.getvalue()


_UNIFIED = {
    "image_path": "image",
    "question": "question",
    "question_id": "id",
    "gt_answers": "truth",
    "answer": "answer",
}

_FORMATS: dict[SubmissionFormat, tuple[str, Callable[[Lines], str]]] = {
    "vqa": ("json", _json({"question_id": "id", "answer": "answer"})),
    "vizwiz": ("json", _json({"image": "id", "answer": "answer"})),
    "docvqa": ("json", _json({"questionId": "id", "answer": "answer"})),
    "mmbench": ("tsv", _table),
    "unified": (
        "json",
        _json(
            {"image_path": "image", "question": "question", "question_id": "id", "gt_answers": "truth"}
            | {"answer": "answer"}
        ),
    ),
}
