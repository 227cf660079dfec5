"""Records of questions with options. All are written in the form that the original program's files have, which
SPHINX-MoE was trained with: "Question:", "Choices:", a line an option, and the request for a letter."""

import ast
import base64
import binascii
import contextlib
import csv
import dataclasses
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx_jax.errors import UserError
from sphinx_jax.evaluation.fields import Fields, read_json
from sphinx_jax.evaluation.readers import unified
from sphinx_jax.evaluation.records import Record

_ASK_LETTER = 'Answer with the option"s letter from the given choices directly.'

_OPTION = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


def choice_question(question: str, options: Mapping[str, str], hint: str = "") -> str:
    """The text that asks for the letter of an option. `hint` is context that comes before the question."""
    context = f"Context:\n{hint}\n" if hint else ""
    choices = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return f"{context}Question:\n{question}\nChoices:\n{choices}{_ASK_LETTER}"


def _options_in(question: str) -> dict[str, str]:
    """The options that a question of the original program's files lists."""
    _, _, choices = question.rpartition("Choices:\n")
    return dict(_OPTION.findall(choices)) if choices != question else {}


def read_unified_choices(files: Sequence[Path]) -> list[Record]:
    """The original program's format; the answer is a letter, and the question lists the options."""
    records = []
    for record in unified(files[0]):
        options = _options_in(record.question)
        if record.truths[0] not in options:
            raise UserError(
                f"{files[0]}: record {record.number}: the answer {record.truths[0]!r} is none of the options that "
                f"the question lists ({', '.join(options) or 'none'})"
            )
        records.append(dataclasses.replace(record, extra={"options": options}))
    return records


def read_unified_mmmu(files: Sequence[Path]) -> list[Record]:
    """MMMU in the original program's format. The subject is in the image's name; several answers are one text."""
    records = []
    for record in unified(files[0]):
        subject = re.search(r"_(\w+?)_\d+\.\w+$", str(record.image))
        if subject is None:
            raise UserError(
                f'{files[0]}: record {record.number}: "image_path" must end in _SUBJECT_NUMBER.jpg, got '
                f"{record.image!r}"
            )
        options = _options_in(record.question)
        extra = {
            "question_type": "multiple-choice" if options else "open",
            "options": options,
            "subject": subject[1],
        }
        records.append(dataclasses.replace(record, truths=_answers_in(record.truths[0]), extra=extra))
    return records


def _answers_in(text: str) -> tuple[str, ...]:
    """Several answers are written as a list of Python: "['24/7', '3.429']"."""
    if text.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            values = ast.literal_eval(text)
            if isinstance(values, list) and values:
                return tuple(map(str, values))
    return (text,)


# MMBench


def read_mmbench(files: Sequence[Path]) -> list[Record]:
    """MMBench's tables (https://github.com/open-compass/MMBench), with images as base64 in their cells.

    An image cell may hold the index of the row that has the image. A test split has no answers.
    """
    rows = list(_rows(files[0]))
    images = {fields.text("index"): fields.text("image") for fields in rows}
    records = []
    for number, fields in enumerate(rows, start=1):
        index, cell = fields.text("index"), fields.text("image")
        options = {letter: fields.text(letter) for letter in string.ascii_uppercase[:10] if letter in fields}
        if len(options) < 2:
            raise UserError(f"{fields.where}: has no options; the columns A, B, ... must hold them")
        truths = (fields.text("answer"),) if "answer" in fields else ()
        if truths and truths[0] not in options:
            raise fields.wrong("answer", f"one of {', '.join(options)}")
        names = {"category": "category", "l2-category": "l2_category"}
        text = fields.text("question")
        extra: dict[str, Any] = {"options": options, "index": _whole_number(fields, index), "question": text}
        extra |= {key: fields.text(name) for name, key in names.items() if name in fields}
        question = choice_question(text, options, fields.text("hint") if "hint" in fields else "")
        image = _decode(fields, images.get(cell, cell))
        records.append(Record(number, image, question, truths, extra["index"], extra))
    return records


def _whole_number(fields: Fields, text: str) -> int:
    if not text.isdecimal():
        raise fields.wrong("index", "a whole number")
    return int(text)


def _decode(fields: Fields, cell: str) -> bytes:
    try:
        return base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise fields.wrong("image", "an image in base64, or the index of the row that has it") from error


def _rows(file: Path) -> Iterator[Fields]:
    """The rows of a table with tabs."""
    # Images in cells exceed the default limit of 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            for number, row in enumerate(csv.DictReader(text, delimiter="\t"), start=1):
                yield Fields(row, f"{file}: row {number}")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is no table with tabs ({error}); get the file again") from error


# SEED-Bench


def read_seed_images(files: Sequence[Path]) -> list[Record]:
    """The questions of SEED-Bench about images, whose names are `data_id`."""
    return [record for record in read_seed(files) if record.extra["split"] == "image"]


def read_seed(files: Sequence[Path]) -> list[Record]:
    """SEED-Bench.json (https://huggingface.co/datasets/AILab-CVC/SEED-Bench), images and videos.

    Of a video, one frame is asked about: SEED-Bench-video-image/QUESTION_ID.png, extracted beforehand.
    """
    top = Fields(read_json(files[0]), str(files[0]))
    types = {number: name for name, number in top.get("question_type", dict, "an object of type ids").items()}
    records = []
    for number, fields in enumerate(top.objects("questions"), start=1):
        options = {letter: fields.answer(f"choice_{letter.lower()}") for letter in "ABCD"}
        truth, kind = fields.text("answer"), fields.text("data_type")
        if truth not in options:
            raise fields.wrong("answer", "A, B, C or D")
        type_id = fields.id("question_type_id")
        if type_id not in types:
            raise fields.wrong("question_type_id", "an id that question_type names")
        question_id = fields.id("question_id")
        image = str(fields.id("data_id")) if kind == "image" else f"{question_id}.png"
        extra = {"options": options, "question_type": types[type_id], "split": kind}
        question = choice_question(fields.text("question"), options)
        records.append(Record(number, image, question, (truth,), question_id, extra))
    return records
