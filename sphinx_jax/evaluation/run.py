"""Answers to the questions of a task, a line a question as it ends, resumed where it was stopped."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharding import broadcast_from_primary, is_primary_process
from sphinx_jax.data.images import load_image
from sphinx_jax.errors import UserError
from sphinx_jax.evaluation.data_folder import DataFolder
from sphinx_jax.evaluation.lines import answers_file, image_name, line_of
from sphinx_jax.evaluation.records import Record
from sphinx_jax.evaluation.tasks import STOP, Task
from sphinx_jax.inference.answers_file import AnswersFile, digest_of, key_of, write_line
from sphinx_jax.inference.batch_file import Progress
from sphinx_jax.inference.capacity import NumSeqs
from sphinx_jax.inference.complete_each import THREADS, complete_each
from sphinx_jax.inference.requests import PreparedImage, Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.sphinx import Sphinx


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked: `params` but for the length, which is the task's; `data` is where images are."""

    params: SamplingParams
    data: DataFolder | None
    max_num_seqs: NumSeqs
    prefix_bytes: int | None = None


def answer_task(
    model: Sphinx, task: Task, records: Sequence[Record], out: Path, asking: Asking, settings: Mapping[str, Any]
) -> Iterator[Progress]:
    """Answer the records that OUT/<task>.jsonl does not answer yet. Yields the progress after each.

    `settings` decide the answers besides the task: a file of answers made with others, or from other prompts, is
    refused. Of several processes the primary one has the records and the file; all call this and answer.
    """
    params = dataclasses.replace(asking.params, max_new_tokens=task.max_new_tokens, stop=(STOP, *asking.params.stop))
    path, by_number = answers_file(out, task), {record.number: record for record in records}
    all_settings = {**settings, **dataclasses.asdict(params), "answer prefix": task.prefix}
    digests = {key_of(n): digest_of(task.prompt(r), image_name(r)) for n, r in by_number.items()}

    def left() -> list[int]:
        """Numbers of the records to ask, in the primary process."""
        answers = AnswersFile(path, key="n")
        answers.check_run(all_settings, digests)
        return [record.number for record in grouped_by_image(records) if key_of(record.number) not in answers.done]

    numbers, total = broadcast_from_primary(lambda: (left(), len(records)))
    progress = Progress(total, skipped=total - len(numbers))
    # Questions about one image stand together.
    prepared = functools.lru_cache(maxsize=2 * THREADS)(lambda image: prepare_image(model, task, asking.data, image))

    def request(number: int) -> Request:
        record = by_number[number]
        image = None if record.image is None else prepared(record.image)
        return model.request(task.prompt(record), image, params, prefix=task.prefix)

    is_primary = is_primary_process()
    with AnswersFile(path, key="n").open(all_settings, digests) if is_primary else contextlib.nullcontext() as file:
        for number, result in complete_each(model.engine, numbers, request, asking.max_num_seqs, asking.prefix_bytes):
            if is_primary:
                write_line(file, line_of(task, by_number[number], result))
            if isinstance(result, UserError):
                progress.failed += 1
            else:
                progress.answered += 1
                progress.tokens += len(result.tokens)
            yield progress
    yield progress


def prepare_image(model: Sphinx, task: Task, data: DataFolder | None, image: str | bytes) -> PreparedImage:
    """The image of a record. Raises UserError if it is missing or damaged."""
    return model.prepare_image(load_image(image if isinstance(image, bytes) else image_path(task, data, image)))


def image_path(task: Task, data: DataFolder | None, image: str) -> Path:
    """The file of an image that a record names."""
    return data.image(image, task.image_folders) if data else Path(image)


def grouped_by_image(records: Sequence[Record]) -> list[Record]:
    """The records, those about one image next to each other: their prompts share the prefix that it makes."""
    first: dict[str | bytes | None, int] = {}
    for i, record in enumerate(records):
        first.setdefault(record.image, i)
    return sorted(records, key=lambda record: first[record.image])
