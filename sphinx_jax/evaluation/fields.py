"""Files of benchmarks as checked fields: whatever is wrong is one sentence with the file and the record."""

import codecs
import json
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sphinx_jax.errors import UserError


def read_text(file: Path) -> str:
    """The text of a UTF-8 file. Raises UserError if it cannot be read or is none."""
    try:
        return file.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 at byte {error.start}; get the file again") from error


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises UserError if it is none."""
    text = read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.startswith("version https://git-lfs"):
            raise UserError(f"{file}: is a git-lfs pointer, not the file itself; run git lfs pull") from error
        raise UserError(f"{file}: is not JSON ({error}); get the file again") from error


class Fields:
    """One record of a file. Its methods raise UserError, with the file and the record, on a missing or wrong field."""

    def __init__(self, value: Any, where: str):
        self.where = where
        if not isinstance(value, dict):
            raise UserError(f"{where}: must be an object, got {reprlib.repr(value)}")
        self._value = value

    def __contains__(self, name: str) -> bool:
        return self._value.get(name) not in (None, "")

    def items(self) -> Iterable[tuple[str, Any]]:
        """Names and values of all fields."""
        return self._value.items()

    def wrong(self, name: str, expected: str) -> UserError:
        """The error that the field `name` is not what is expected."""
        found = f"got {reprlib.repr(self._value[name])}" if name in self._value else "and is missing"
        return UserError(f'{self.where}: "{name}" must be {expected}, {found}')

    def get(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """The value of a field, of a type."""
        value = self._value.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.wrong(name, expected)
        return value

    def text(self, name: str) -> str:
        """A text that is not empty."""
        value = self.get(name, str, "a text")
        if not value.strip():
            raise self.wrong(name, "a text that is not empty")
        return value

    def id(self, name: str) -> str | int:
        return self.get(name, (str, int), "a text or a whole number")

    def answer(self, name: str) -> str:
        """A true answer, as text; numbers are often written as such."""
        return str(self.get(name, (str, int, float), "a text"))

    def answers(self, name: str) -> tuple[str, ...]:
        """A list of true answers: texts, or objects with "answer"."""
        values = self.get(name, list, "a list of answers")
        texts = [value.get("answer") if isinstance(value, dict) else value for value in values]
        if not texts or not all(isinstance(text, str | int | float) for text in texts):
            raise self.wrong(name, "a list of answers")
        return tuple(map(str, texts))

    def objects(self, name: str) -> "Iterator[Fields]":
        """A list of records."""
        return objects(self.get(name, list, "a list of records"), self.where)


def objects(values: Any, where: str) -> Iterator[Fields]:
    """Each record of a list, named by its number, from 1. Raises UserError if it is no list, or an empty one."""
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: must hold a list of records, got {reprlib.repr(values)}")
    return (Fields(value, f"{where}: record {number}") for number, value in enumerate(values, start=1))
