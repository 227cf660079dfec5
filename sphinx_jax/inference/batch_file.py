"""A file of questions in, a file of answers out: all batch slots kept full, resumable, a bad line harms no other.

    {"id": 7, "image": "cat.jpg", "prompt": "What is this?"}  ->  {"id": 7, "answer": "A cat."}

`image` may be null, missing, or a data: URL. A relative path is looked up in the working directory, then next to the
file of questions. A line that cannot be answered gives {"id": 7, "line": 3, "error": "..."}. Where adapters are loaded,
`model` is the name of the one that answers, or that of the checkpoint's directory for the base.
"""

import codecs
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sharding import broadcast_from_primary, is_primary_process
from sphinx_jax.data.images import data_url_bytes, is_data_url, load_image, printable
from sphinx_jax.errors import UserError
from sphinx_jax.inference.answers_file import AnswersFile, digest_of, key_of, write_line
from sphinx_jax.inference.capacity import NumSeqs
from sphinx_jax.inference.complete_each import THREADS, complete_each
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.requests import PreparedImage, Request


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of the file; `error` says why it is none."""

    line: int
    id: str | int | None = None
    prompt: str = ""
    image: str | None = None
    model: str | None = None
    error: str | None = None


@dataclasses.dataclass
class Progress:
    """What has been done so far; `answered` and `failed` count lines of this run, `skipped` those of an earlier one."""

    total: int
    skipped: int = 0
    answered: int = 0
    failed: int = 0
    tokens: int = 0


def read_questions(source: Path) -> list[Question]:
    """The lines of a file of questions, empty ones left out. Raises UserError if it has none or cannot be read."""
    try:
        data = source.read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--batch {printable(source)}: cannot read the file ({reason})") from error
    if _is_array(data):
        raise UserError(
            f"--batch {source}: the file is one JSON array; write one object on each line, as `jq -c '.[]'` does"
        )
    questions, seen = [], {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        question = _parse(number, line)
        if question.error is None:
            first = seen.setdefault(key_of(question.id), number)
            if first != number:
                error = f"line {number}: the id {question.id!r} was used on line {first} already"
                question = Question(number, question.id, error=error)
        questions.append(question)
    if not questions:
        raise UserError(f"--batch {source}: the file holds no questions; it needs one JSON object on each line")
    return questions


def _is_array(data: bytes) -> bool:
    """Whether the file as a whole is a JSON array of objects."""
    if not data.lstrip().startswith(b"["):
        return False
    try:
        records = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(records, list) and any(isinstance(record, dict) for record in records)


def _parse(number: int, line: bytes) -> Question:
    try:
        record = json.loads(line)
    except RecursionError:
        return Question(number, error=f"line {number}: not JSON that can be read (nested too deeply)")
    except ValueError as error:
        return Question(number, error=f"line {number}: not JSON ({error})")
    if not isinstance(record, dict):
        return Question(number, error=f"line {number}: not a JSON object")
    name, prompt, image, model = (record.get(key) for key in ("id", "prompt", "image", "model"))
    if not isinstance(name, str | int) or isinstance(name, bool):
        return Question(number, error=f'line {number}: "id" must be a text or a whole number')
    if not isinstance(prompt, str) or not prompt.strip():
        return Question(number, name, error=f'line {number}: "prompt" must be a text that is not empty')
    if image is not None and not isinstance(image, str):
        return Question(number, name, error=f'line {number}: "image" must be a path or null')
    return Question(number, name, prompt, image, model if isinstance(model, str) else None)


def open_named_image(name: str, folder: Path) -> Path | Image.Image:
    """The image of a question: the path, looked up in the working directory, then in `folder`; or a decoded data: URL.

    Raises UserError on a name that is neither.
    """
    if is_data_url(name):
        return load_image(data_url_bytes(name), "the image of the data: URL")
    if "://" in name:
        return load_image(name)  # Raises: URLs are not read.
    try:
        here = Path(name)
        return here if here.exists() else folder / here
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the image {name!r:.60} is not the path of a file ({reason})") from error


def answer_file(
    engine: Engine,
    source: Path,
    out: Path,
    prepare_image: Callable[[Path | Image.Image], PreparedImage],
    make_request: Callable[[str, PreparedImage | None, str | None], Request],
    *,
    settings: Mapping[str, Any],
    max_num_seqs: NumSeqs,
    logprobs: bool = False,
    prefix_bytes: int | None = None,
) -> Iterator[Progress]:
    """Answer every question of `source` that `out` does not answer yet, appending lines to `out` as answers end.

    `make_request` makes a request of a prompt, an image and the model that the question names. `settings` are what
    decides the answers besides: they are recorded next to `out`, and a file of answers made with others is refused.
    Yields the progress after each answer.
    Of several processes the primary one reads and writes the files; all answer.
    """

    def read() -> tuple[list[Question], set[str]]:
        questions, answers = check_files(source, out)
        answers.check_run(settings, _digests(questions))
        return questions, answers.done

    questions, done = broadcast_from_primary(read)
    left = [question for question in questions if question.error or key_of(question.id) not in done]
    progress = Progress(len(questions), skipped=len(questions) - len(left))
    is_primary = is_primary_process()
    # Questions about one image are usually next to each other.
    prepare_cached = functools.lru_cache(maxsize=2 * THREADS)(
        lambda name: prepare_image(open_named_image(name, source.parent))
    )

    def request(question: Question) -> Request:
        if question.error:
            raise UserError(question.error)
        image = None if question.image is None else prepare_cached(question.image)
        return make_request(question.prompt, image, question.model)

    with AnswersFile(out).open(settings, _digests(questions)) if is_primary else contextlib.nullcontext() as file:
        for question, result in complete_each(engine, left, request, max_num_seqs, prefix_bytes):
            if isinstance(result, UserError):
                error = question.error or f"line {question.line}: {result}"
                write_line(file, {"id": question.id, "line": question.line, "error": error})
                progress.failed += 1
                continue
            record = {"id": question.id, "answer": result.text}
            if logprobs:
                record["logprobs"] = [round(value, 6) for value in result.logprobs]
            write_line(file, record)
            progress.answered += 1
            progress.tokens += len(result.tokens)
            yield progress
    yield progress


def check_files(source: Path, out: Path) -> tuple[list[Question], AnswersFile]:
    """The questions, and the file for the answers. Raises UserError on whichever cannot be used; nothing is written."""
    questions = read_questions(source)
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out}: is the file of questions itself; choose another")
    return questions, AnswersFile(out)


def _digests(questions: Iterable[Question]) -> dict[str, str]:
    return {key_of(q.id): digest_of(q.prompt, q.image, q.model) for q in questions if q.error is None}
