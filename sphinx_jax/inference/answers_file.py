"""The file that answers are appended to: what it holds already, and what made it.

Next to a regular file OUT, `OUT.run.json` records the settings and the questions that its answers belong to, so that a
later start never mixes answers of different runs. Devices and pipes are written to and never read.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sphinx_jax.data.images import printable
from sphinx_jax.errors import UserError


def key_of(question_id: str | int | None) -> str:
    """Tells 7 from "7"."""
    return json.dumps(question_id)


def digest_of(prompt: str, image: str | None, model: str | None = None) -> str:
    """What a question asked, and of which model if it names one, in 16 characters."""
    content = json.dumps([prompt, image] if model is None else [prompt, image, model]).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def write_line(file: TextIO | None, record: Mapping[str, Any]) -> None:
    """Append a record to a file of answers, whole before anything else is done. None: another process has the file."""
    if file is None:
        return
    text = json.dumps(record, ensure_ascii=False)
    # Half of a surrogate pair, in an id, has no UTF-8.
    file.write((text if text.isascii() or _has_utf8(text) else json.dumps(record)) + "\n")
    file.flush()


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, or replace it, in one step: a program that is killed leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def check_settings(earlier: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
    """Raises UserError, which begins with `name`, if answers made with `earlier` settings do not belong to `now`."""
    now = json.loads(json.dumps(now))
    for key in sorted(now.keys() | earlier.keys()):
        if now.get(key) != earlier.get(key):
            raise UserError(
                f"{name}: its answers were made with {key} {earlier.get(key)}, not {now.get(key)}; choose another, or "
                "remove this one"
            )


def run_file(path: Path) -> Path:
    """What records the settings and the questions of a file of answers."""
    return path.with_name(f"{path.name}.run.json")


class AnswersFile:
    """A file of answers, checked when it is made: nothing is written before `open`.

    Raises UserError where the path cannot be written, or is a regular file that holds something else than answers.
    """

    def __init__(self, path: Path, key: str = "id"):
        """`key`: the field of a line that identifies its question."""
        self.name, self._key = path, key
        try:
            # A link is followed: replacing it would leave the file that it names stale.
            self._path = path.resolve()
            mode = os.stat(self._path).st_mode if self._path.exists() else None
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--out {printable(path)}: not the path of a file ({error}); choose another") from error
        self._is_regular = mode is None or stat.S_ISREG(mode)
        self._run_file, self._kept = run_file(self._path), list[bytes]()
        self.done: set[str] = set()
        """Keys of the questions that are answered."""
        if mode is not None and stat.S_ISDIR(mode):
            raise UserError(f"--out {path}: is a directory; choose a file in it")
        if mode is None and not self._path.parent.is_dir():
            raise UserError(f"--out {path}: the directory {self._path.parent} does not exist; create it first")
        if not os.access(self._path if mode is not None else self._path.parent, os.W_OK):
            raise UserError(f"--out {path}: cannot be written; change its permissions or choose another file")
        if mode is not None and self._is_regular:
            self._read()

    def _read(self) -> None:
        """Keep the answers. Errors, and a last line cut short, are dropped: those questions are tried again."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise UserError(f"--out {self.name}: cannot read the file ({error.strerror})") from error
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                is_known = (
                    isinstance(record, dict) and self._key in record and ("answer" in record or "error" in record)
                )
            except (ValueError, RecursionError):
                record, is_known = {}, number == len(lines) and not line.endswith(b"\n")
            if not is_known:
                raise UserError(f"--out {self.name}: line {number} is no answer of an earlier run; choose another file")
            if "answer" in record:
                self._kept.append(line if line.endswith(b"\n") else line + b"\n")
                self.done.add(key_of(record[self._key]))

    def _recorded(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The settings of the answers that the file holds, and the digests of their questions; empty if unknown."""
        if not self.done or not self._run_file.exists():
            return {}, {}
        try:
            earlier = json.loads(self._run_file.read_text())
            return dict(earlier["settings"]), dict(earlier["questions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._run_file}: cannot be read ({error}); remove it and --out {self.name} to start over"
            ) from error

    def check_run(self, settings: Mapping[str, Any], questions: Mapping[str, str]) -> None:
        """Raises UserError if the answers that the file holds were made with other settings or for other questions.

        `questions` gives the digest of each question by its key.
        """
        old_settings, old_questions = self._recorded()
        if old_settings:
            check_settings(old_settings, settings, f"--out {self.name}")
        for key in sorted(self.done & old_questions.keys() & questions.keys()):
            if questions[key] != old_questions[key]:
                raise UserError(
                    f"--out {self.name}: the question with {self._key} {key} was another one; choose another file, or "
                    "remove this one"
                )

    def open(self, settings: Mapping[str, Any], questions: Mapping[str, str]) -> TextIO:
        """The file to append to, after the answers that stay; what it is made with is recorded.

        Raises UserError if it cannot be opened.
        """
        try:
            if not self._is_regular:
                # A pipe that nobody reads would wait here for ever.
                return os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK), "w", encoding="utf-8")
            if self._path.exists():
                write_whole(self._path, b"".join(self._kept))
            # Answers to questions that are not asked this time stay, and so does what they answer.
            _, earlier = self._recorded()
            record = {"settings": dict(settings), "questions": earlier | dict(questions)}
            write_whole(self._run_file, (json.dumps(record, indent=1) + "\n").encode())
            return self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {self.name}: cannot be written ({error.strerror}); choose another file") from error
