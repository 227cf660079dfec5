"""A file of questions in, a file of answers out: rows kept full, restartable, a bad line harms no other.

    {"id": 7, "image": "cat.jpg", "prompt": "What is this?"}  ->  {"id": 7, "answer": "A cat."}

`image` may be null or missing. A relative path is looked up in the working directory, then beside the file
of questions. A line that cannot be answered gives {"id": 7, "line": 3, "error": "..."}.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sharding import broadcast_each_from_primary, broadcast_from_primary, is_primary_process
from sphinx_jax.errors import UserError
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.requests import PreparedImage, Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.serving import serve

AHEAD = 32
"""Lines whose pictures are opened while the model works."""

THREADS = 2

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of the file; `error` says why it is none."""

    line: int
    id: str | int | None = None
    prompt: str = ""
    image: str | None = None
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
        lines = source.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--batch {source}: cannot read the file ({error.strerror})") from error
    questions, seen = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _parse(number, line)
        if question.error is None:
            first = seen.setdefault(_key(question.id), number)
            if first != number:
                error = f"line {number}: the id {question.id!r} was used on line {first} already"
                question = Question(number, question.id, error=error)
        questions.append(question)
    if not questions:
        raise UserError(f"--batch {source}: the file holds no questions; it needs one JSON object on each line")
    return questions


def _parse(number: int, line: bytes) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        return Question(number, error=f"line {number}: not JSON ({error})")
    if not isinstance(record, dict):
        return Question(number, error=f"line {number}: not a JSON object")
    name, prompt, image = (record.get(key) for key in ("id", "prompt", "image"))
    if not isinstance(name, str | int) or isinstance(name, bool):
        return Question(number, error=f'line {number}: "id" must be a text or a whole number')
    if not isinstance(prompt, str) or not prompt.strip():
        return Question(number, name, error=f'line {number}: "prompt" must be a text that is not empty')
    if image is not None and not isinstance(image, str):
        return Question(number, name, error=f'line {number}: "image" must be a path or null')
    return Question(number, name, prompt, image)


def _key(name: str | int) -> str:
    """Tells 7 from "7"."""
    return json.dumps(name)


def resume_from(out: Path) -> set[str]:
    """Keys of the questions that `out` answers already.

    Errors in it, and a last line cut short, are taken out, so that those questions are tried again.
    Raises UserError if `out` is something else than a file of answers: it is not touched then.
    """
    if not out.exists():
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: the directory {out.parent} does not exist; create it first")
        return set()
    try:
        lines = out.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot read the file ({error.strerror})") from error
    kept, done = [], set()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            known = isinstance(record, dict) and "id" in record and ("answer" in record or "error" in record)
        except ValueError:
            known = number == len(lines) and not line.endswith(b"\n")
            record = {}
        if not known:
            raise UserError(f"--out {out}: line {number} is no answer of an earlier run; choose another file")
        if "answer" in record:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            done.add(_key(record["id"]))
    partial = out.with_name(f".{out.name}.partial")
    partial.write_bytes(b"".join(kept))
    os.replace(partial, out)
    return done


def answer_file(
    engine: Engine,
    source: Path,
    out: Path,
    look: Callable[[Path], PreparedImage],
    ask: Callable[[str, PreparedImage | None], Request],
    *,
    sampling: SamplingParams,
    stops: Sequence[str],
    max_num_seqs: int,
    logprobs: bool = False,
) -> Iterator[Progress]:
    """Answer every question of `source` that `out` does not answer yet, appending lines to `out` as answers end.

    `look` opens a picture, `ask` makes a request of a prompt and a picture. Yields the progress after each answer.
    Of several processes the first one reads and writes the files; all answer.
    """

    def begin() -> tuple[list[Question], set[str]]:
        if out.resolve() == source.resolve():
            raise UserError(f"--out {out}: is the file of questions itself; choose another")
        return read_questions(source), resume_from(out)

    questions, done = broadcast_from_primary(begin)
    left = [question for question in questions if question.error or _key(question.id) not in done]
    progress = Progress(len(questions), skipped=len(questions) - len(left))
    asked: list[Question] = []

    with out.open("a", encoding="utf-8") if is_primary_process() else contextlib.nullcontext() as file:

        def write(record: dict[str, Any]) -> None:
            if file is not None:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()

        def requests() -> Iterator[Request]:
            # The questions about one picture usually stand together.
            looked = functools.lru_cache(maxsize=2 * THREADS)(look)
            read = functools.partial(_request, engine, source.parent, looked, ask)
            for question, request in broadcast_each_from_primary(_ahead(read, left)):
                if isinstance(request, Request):
                    asked.append(question)
                    yield request
                else:
                    progress.failed += 1
                    write({"id": question.id, "line": question.line, "error": request})

        for index, completion in serve(engine, requests(), sampling, stops, max_num_seqs):
            record = {"id": asked[index].id, "answer": completion.text}
            if logprobs:
                record["logprobs"] = [round(value, 6) for value in completion.logprobs]
            write(record)
            progress.answered += 1
            progress.tokens += len(completion.tokens)
            yield progress
    yield progress


def _request(
    engine: Engine,
    folder: Path,
    look: Callable[[Path], PreparedImage],
    ask: Callable[[str, PreparedImage | None], Request],
    question: Question,
) -> tuple[Question, Request | str]:
    """The question as a request, or what is wrong with it."""
    if question.error:
        return question, question.error
    try:
        picture = None
        if question.image is not None:
            here = Path(question.image)
            picture = look(here if here.exists() else folder / here)
        request = ask(question.prompt, picture)
        engine.prompt_length(request)
    except UserError as error:
        return question, f"line {question.line}: {error}"
    return question, request


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item in order, computed by threads a little before it is asked for."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
