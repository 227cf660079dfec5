"""easy-vqa: 5,000 drawn pictures of one coloured shape, and 48,248 questions about them.

The data is synthetic and comes in the wheel of PyPI's `easy-vqa` 1.0. Several questions of one picture
train as turns of one sequence; each turn sees the shared beginning and itself (`language.cache.segment_mask`),
so it is trained exactly as if it were asked alone.
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

import grain
import numpy as np
from jaxtyping import Int, UInt8

from sphinx_jax.data.conversation import IGNORE_INDEX, PADDING, Conversation
from sphinx_jax.data.dataset import Batch, batches
from sphinx_jax.data.images import open_image
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

IMAGE_SIZE = 64
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
YES_NO = ("yes", "no")

Split = Literal["train", "test", "tuning", "validation"]
_VALIDATION_SHARE = 0.1
_VALIDATION_SEED = 20260
_MAX_SHIFT = 4


class Question(NamedTuple):
    text: str
    answer: str


class Record(NamedTuple):
    """One picture and all that is asked about it."""

    id: int
    image: UInt8[np.ndarray, "64 64 3"]
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Records(Sequence[Record]):
    """The pictures of a split, in the order of their numbers, as one array; indexes like a list."""

    ids: tuple[int, ...]
    images: UInt8[np.ndarray, "count 64 64 3"]
    questions: tuple[tuple[Question, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return Record(self.ids[index], self.images[index], self.questions[index])

    def select(self, indices: Sequence[int]) -> "Records":
        return Records(
            tuple(self.ids[i] for i in indices),
            self.images[np.asarray(indices, np.int64)],
            tuple(self.questions[i] for i in indices),
        )

    def pairs(self) -> Iterator[tuple[int, Question]]:
        """(index of the picture, question) of every question, picture by picture."""
        return ((i, question) for i, questions in enumerate(self.questions) for question in questions)


def load(split: Split) -> Records:
    """All records of "train" (4,000 pictures) or "test" (1,000).

    "tuning" and "validation" are the training pictures in two parts, 3,600 and 400, always the same: choices
    are made on them, so that the test pictures are looked at once. Raises UserError if easy-vqa is not
    installed or damaged.
    """
    if split in ("train", "test"):
        return _read(split)
    train = _read("train")
    order = np.random.default_rng(_VALIDATION_SEED).permutation(len(train))
    cut = round(len(train) * _VALIDATION_SHARE)
    chosen = {"validation": order[:cut], "tuning": order[cut:]}[split]
    return train.select(sorted(chosen.tolist()))


def image_file(split: Literal["train", "test"], number: int) -> Path:
    """Where the picture with this number (`Record.id`) lies. Raises UserError if easy-vqa is not installed."""
    return _folder(split) / "images" / f"{number}.png"


def _folder(split: Literal["train", "test"]) -> Path:
    # Found, not imported: the wheel also installs a package named `test`, which is nobody's business here.
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
    asked: dict[int, list[Question]] = collections.defaultdict(list)
    try:
        for text, answer, number in json.loads(questions_file.read_text(encoding="utf-8")):
            asked[int(number)].append(Question(text, answer))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{questions_file}: cannot be read; install easy-vqa==1.0 again ({error})") from error
    ids = tuple(sorted(asked))
    pictures = [np.asarray(open_image(image_file(split, number))) for number in ids]
    if {picture.shape for picture in pictures} != {(IMAGE_SIZE, IMAGE_SIZE, 3)}:
        raise UserError(f"{folder}: lacks pictures of {IMAGE_SIZE} x {IMAGE_SIZE} pixels; install easy-vqa==1.0 again")
    images = np.stack(pictures)
    images.flags.writeable = False
    return Records(ids, images, tuple(tuple(asked[number]) for number in ids))


def texts(records: Records) -> list[str]:
    """The distinct conversations of one question each, for training a tokenizer on."""
    distinct = sorted({question for _, question in records.pairs()})
    return [Conversation.from_pairs([question]).text() for question in distinct]


# Scores


def score(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, float]:
    """Share of right answers: "overall", "yes_no" and "open" (the rest). Case and outer spaces do not count."""
    right = np.array([p.strip().lower() == q.answer for q, p in zip(questions, predictions, strict=True)])
    yes_no = np.array([q.answer in YES_NO for q in questions])
    share = lambda mask: float(right[mask].mean()) if mask.any() else float("nan")
    return {"overall": share(np.ones_like(yes_no)), "yes_no": share(yes_no), "open": share(~yes_no)}


def blind_baseline(train: Records, held_out: Records) -> dict[str, float]:
    """`score` of answering each question with its most common training answer, the picture unseen."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for _, question in train.pairs():
        counts[question.text][question.answer] += 1
    questions = [question for _, question in held_out.pairs()]
    # Ties go to the answer that came first; a question never asked in training gets none.
    guess = {text: count.most_common(1)[0][0] for text, count in counts.items()}
    return score(questions, [guess.get(question.text, "") for question in questions])


# Attributes


class Attributes(NamedTuple):
    shape: str | None
    colour: str | None


def attributes(questions: Sequence[Question]) -> Attributes:
    """Shape and colour of a picture as far as its questions and answers tell; the picture is not looked at.

    "what is the blue shape?" tells the colour as well as, with its answer, the shape. A denied value only
    rules itself out. For an auxiliary loss in training.
    """
    return Attributes(*(_possible(questions, values) for values in (SHAPES, COLOURS)))


def _possible(questions: Sequence[Question], values: tuple[str, ...]) -> str | None:
    left = set(values)
    for text, answer in questions:
        words = set(re.findall(r"[a-z]+", text))
        mentioned = words & set(values)
        if answer in YES_NO:
            negated = bool(words & {"not", "no"})
            holds = (answer == "yes") != negated
            if mentioned:
                left = left & mentioned if holds else left - mentioned
        else:
            # An open question takes what it names for granted.
            left &= mentioned or ({answer} if answer in values else left)
    return left.pop() if len(left) == 1 else None


# Training sequences


@dataclasses.dataclass(frozen=True, eq=False)
class TurnTable:
    """Every distinct question and answer as token ids, ready to be joined.

    `beginning` is what all prompts share; `tokens[i]` and `labels[i]` of turn i follow it. `of_record[r]` lists
    the turns that record r has.
    """

    beginning: Int[np.ndarray, "shared"]
    tokens: tuple[Int[np.ndarray, "_"], ...]
    labels: tuple[Int[np.ndarray, "_"], ...]
    of_record: tuple[Int[np.ndarray, "_"], ...]

    @classmethod
    def build(cls, records: Records, tokenizer: Tokenizer) -> "TurnTable":
        distinct = sorted({question for _, question in records.pairs()})
        number = {question: i for i, question in enumerate(distinct)}
        # Without its EOS, which follows the last answer only and is not learned.
        examples = [Conversation.from_pairs([question]).example(tokenizer) for question in distinct]
        ids = [example.tokens[:-1] for example in examples]
        beginning = _shared_beginning(tokenizer)
        shared = len(beginning)
        if any(not np.array_equal(row[:shared], beginning) for row in ids):
            raise ValueError("a piece of the tokenizer runs over the border between the beginning and a turn")
        return cls(
            beginning,
            tuple(row[shared:] for row in ids),
            tuple(example.labels[shared:-1] for example in examples),
            tuple(np.array([number[question] for question in questions]) for questions in records.questions),
        )

    def longest(self) -> int:
        return max(len(row) for row in self.tokens)


def _shared_beginning(tokenizer: Tokenizer) -> Int[np.ndarray, "shared"]:
    beginning = Conversation(()).text()
    return np.asarray(tokenizer.encode(beginning, bos=True, eos=False), np.int32)


def sequence(
    table: TurnTable, turns: Sequence[int], max_length: int, padding_turn: int
) -> tuple[Int[np.ndarray, "length"], Int[np.ndarray, "length"], Int[np.ndarray, "length"]]:
    """Tokens, labels and turn numbers of the shared beginning and the given turns, padded to `max_length`.

    labels[i] is tokens[i] where learned and NOT_LEARNED elsewhere, not shifted: the scores at i - 1 are to predict
    labels[i]. The beginning has turn 0, the turns 1, 2, ..., padding `padding_turn`, so that none sees another.
    Turns that no longer fit are left out.
    """
    tokens = np.full(max_length, PADDING, np.int32)
    labels = np.full(max_length, IGNORE_INDEX, np.int32)
    numbers = np.full(max_length, padding_turn, np.int32)
    end = len(table.beginning)
    tokens[:end], numbers[:end] = table.beginning, 0
    for number, turn in enumerate(turns, start=1):
        start, end = end, end + len(table.tokens[turn])
        if end > max_length:
            break
        tokens[start:end], labels[start:end], numbers[start:end] = table.tokens[turn], table.labels[turn], number
    return tokens, labels, numbers


def augment(
    images: UInt8[np.ndarray, "batch height width 3"], random: np.random.Generator
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Each picture mirrored or not, and moved by up to 4 pixels each way; what comes into view is background."""
    batch, height, width, _ = images.shape
    mirrored = random.random(batch) < 0.5
    offsets = random.integers(0, 2 * _MAX_SHIFT + 1, (batch, 2))
    # A shape may cover one corner, hardly two: of the four, the second smallest value is the background's.
    background = np.sort(images[:, [0, 0, -1, -1], [0, -1, 0, -1]], axis=1)[:, 1]
    canvas = np.empty((batch, height + 2 * _MAX_SHIFT, width + 2 * _MAX_SHIFT, 3), np.uint8)
    # Whole rows at once: numpy is slow at repeating three bytes.
    canvas.reshape(batch, canvas.shape[1], -1)[:] = np.tile(background, canvas.shape[2])[:, None]
    canvas[:, _MAX_SHIFT:-_MAX_SHIFT, _MAX_SHIFT:-_MAX_SHIFT] = images
    out = np.empty_like(images)
    for i, (top, left) in enumerate(offsets):
        moved = canvas[i, top : top + height, left : left + width]
        out[i] = moved[:, ::-1] if mirrored[i] else moved
    return out


def train_batches(
    records: Records, tokenizer: Tokenizer, batch_size: int, seed: int, max_length: int, turns_per_picture: int
) -> grain.DatasetIterator[Batch]:
    """An endless, resumable iterator of training batches; the same seed gives the same batches.

    Each batch: "images" uint8[B, 64, 64, 3], augmented; "tokens", "labels" and "segment_ids" int32[B, max_length] as
    `sequence` makes them, of up to `turns_per_picture` questions drawn at random; "shape" and "colour" int32[B],
    the places in SHAPES and COLOURS, or -1 where the questions do not tell; "examples" int[B], the places in `records`.
    Raises UserError if `max_length` has no room for a single question.
    """
    table = TurnTable.build(records, tokenizer)
    needed = len(table.beginning) + table.longest()
    if max_length < needed:
        raise UserError(f"maximum length {max_length}: the longest question needs {needed} tokens with its beginning")
    known = [attributes(questions) for questions in records.questions]
    place = lambda values, value: -1 if value is None else values.index(value)
    shape = np.array([place(SHAPES, a.shape) for a in known], np.int32)
    colour = np.array([place(COLOURS, a.colour) for a in known], np.int32)

    def make_batch(indices: Int[np.ndarray, "batch"], random: np.random.Generator) -> Batch:
        rows = []
        for index in indices:
            turns = random.permutation(table.of_record[index])[:turns_per_picture]
            rows.append(sequence(table, turns, max_length, padding_turn=turns_per_picture + 1))
        tokens, labels, numbers = (np.stack(part) for part in zip(*rows, strict=True))
        return {
            "images": augment(records.images[indices], random),
            "tokens": tokens,
            "labels": labels,
            "segment_ids": numbers,
            "shape": shape[indices],
            "colour": colour[indices],
            "examples": np.asarray(indices),
        }

    return batches(len(records), make_batch, batch_size, seed)
