"""easy-vqa: 5,000 drawn images of one coloured shape each, and 48,248 questions about them.

The data is synthetic and comes in the wheel of PyPI's `easy-vqa` 1.0. `easy_vqa_sequences` makes training sequences of
it, `easy_vqa_phrasings` holds further ways to ask.
"""

import collections
import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.easy_vqa_phrasings import COLOURS, SHAPES, KnownAttributes, Question, trained_examples
from sphinx_jax.data.images import load_image
from sphinx_jax.errors import UserError

IMAGE_SIZE = 64
YES_NO = ("yes", "no")

Split = Literal["train", "test", "tuning", "validation"]
_VALIDATION_FRACTION = 0.1
_VALIDATION_SEED = 20260


class Record(NamedTuple):
    """One image and all questions about it."""

    id: int
    image: UInt8[np.ndarray, "64 64 3"]
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Records(Sequence[Record]):
    """The records of a split, ordered by id, with all images in one array."""

    ids: tuple[int, ...]
    images: UInt8[np.ndarray, "count 64 64 3"]
    questions: tuple[tuple[Question, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        return Record(self.ids[index], self.images[index], self.questions[index])

    def select(self, indices: Sequence[int]) -> "Records":
        return Records(
            tuple(self.ids[i] for i in indices),
            self.images[np.asarray(indices, np.int64)],
            tuple(self.questions[i] for i in indices),
        )

    def pairs(self) -> Iterator[tuple[int, Question]]:
        """(index of the record, question) of every question, record by record."""
        return ((i, question) for i, questions in enumerate(self.questions) for question in questions)


def load(split: Split) -> Records:
    """All records of "train" (4,000 images) or "test" (1,000).

    "tuning" and "validation" are the training images in two parts, 3,600 and 400, always the same: choices are based on
    them, so that the test images are evaluated once. Raises UserError if easy-vqa is not installed or damaged.
    """
    if split == "train" or split == "test":
        return _read(split)
    train = _read("train")
    order = np.random.default_rng(_VALIDATION_SEED).permutation(len(train))
    num_validation = round(len(train) * _VALIDATION_FRACTION)
    chosen = {"validation": order[:num_validation], "tuning": order[num_validation:]}[split]
    return train.select(sorted(chosen.tolist()))


def image_file(split: Literal["train", "test"], number: int) -> Path:
    """The file of the image with this `Record.id`. Raises UserError if easy-vqa is not installed."""
    return _folder(split) / "images" / f"{number}.png"


def _folder(split: Literal["train", "test"]) -> Path:
    # Found, not imported: the wheel also installs a package named `test`.
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError(
            "the data set easy-vqa is not installed: run pip install 'sphinx-jax[demo]', or pip install easy-vqa==1.0"
        )
    return Path(spec.origin).parent / "data" / split


@functools.cache
def _read(split: Literal["train", "test"]) -> Records:
    folder = _folder(split)
    questions_file = folder / "questions.json"
    by_image: dict[int, list[Question]] = collections.defaultdict(list)
    try:
        for text, answer, number in json.loads(questions_file.read_text(encoding="utf-8-sig")):
            by_image[int(number)].append(Question(text, answer))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{questions_file}: cannot be read; install easy-vqa==1.0 again ({error})") from error
    ids = tuple(sorted(by_image))
    images = [np.asarray(load_image(image_file(split, number))) for number in ids]
    if {image.shape for image in images} != {(IMAGE_SIZE, IMAGE_SIZE, 3)}:
        raise UserError(f"{folder}: lacks images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels; install easy-vqa==1.0 again")
    stacked = np.stack(images)
    stacked.flags.writeable = False
    return Records(ids, stacked, tuple(tuple(by_image[number]) for number in ids))


def texts(records: Records) -> list[str]:
    """The distinct conversations of one question each, and all phrasings: what a tokenizer is trained on."""
    distinct = sorted({question for _, question in records.pairs()})
    return [Conversation.from_pairs([question]).text() for question in [*distinct, *trained_examples()]]


# Evaluation


def accuracy(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
    """Fraction of right answers: "overall", "yes_no" and "open" (the rest); NaN where there are none.

    Case and surrounding spaces of a prediction are ignored. Raises ValueError if the lengths differ.
    """
    right = np.array([p.strip().lower() == q.answer for q, p in zip(questions, predictions, strict=True)])
    yes_no = np.array([q.answer in YES_NO for q in questions])
    kinds = {"overall": np.ones_like(yes_no), "yes_no": yes_no, "open": ~yes_no}
    return {kind: float(right[mask].mean()) if mask.any() else float("nan") for kind, mask in kinds.items()}


def accuracy_without_images(train: Records, held_out: Records) -> dict[str, float]:
    """`accuracy` of answering each question with its most common training answer: the baseline that ignores images."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for _, question in train.pairs():
        counts[question.text][question.answer] += 1
    questions = [question for _, question in held_out.pairs()]
    # Ties go to the answer seen first; a question without training answers gets none.
    most_common = {text: count.most_common(1)[0][0] for text, count in counts.items()}
    return accuracy(questions, [most_common.get(question.text, "") for question in questions])


# What the questions tell about an image


def known_attributes(questions: Sequence[Question]) -> KnownAttributes:
    """Shape and colour of an image as far as its questions and answers tell; the image itself is not used.

    "what is the blue shape?" tells the colour and, with its answer, the shape. A denied value only rules itself out.
    """
    return KnownAttributes(_only_possible(questions, SHAPES), _only_possible(questions, COLOURS))


def _only_possible(questions: Sequence[Question], values: tuple[str, ...]) -> str | None:
    possible = set(values)
    for text, answer in questions:
        words = set(re.findall(r"[a-z]+", text))
        mentioned = words & set(values)
        if answer in YES_NO:
            negated = bool(words & {"not", "no"})
            holds = (answer == "yes") != negated
            if mentioned:
                possible = possible & mentioned if holds else possible - mentioned
        else:
            # An open question presupposes what it names.
            possible &= mentioned or ({answer} if answer in values else possible)
    return possible.pop() if len(possible) == 1 else None
