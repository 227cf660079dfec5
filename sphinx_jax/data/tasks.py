"""What a run trains on and is judged by: one small interface, and the two kinds of data behind it."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sphinx_jax.config import SphinxConfig
from sphinx_jax.data import accessory_yaml, easy_vqa
from sphinx_jax.data.accessory_yaml import Annotations
from sphinx_jax.data.batching import ItemReader, held_out_batches, packed_rows, train_batches
from sphinx_jax.data.dataset import Batch
from sphinx_jax.data.images import ImageTransform
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tokenizer import Tokenizer, train_tokenizer
from sphinx_jax.errors import UserError


class Task(Protocol):
    """Training batches, held-out batches, and a score of what was right of those."""

    tokenizer_bytes: bytes
    examples: int
    """Sequences in one epoch."""

    def name(self, example: int) -> str:
        """What a person finds a training example by; batches number theirs in "examples"."""
        ...

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Endless training batches; the iterator has `get_state` and `set_state`."""
        ...

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        """The held-out examples once, in order; a batch may be smaller."""
        ...

    def score(self, right: Sequence[np.ndarray], exists: Sequence[np.ndarray]) -> dict[str, Any]:
        """Held-out accuracies for `summary.json`, from which answers (column: number) of each example are right."""
        ...


def first_score(scores: dict[str, Any]) -> float:
    """The accuracy that checkpoints are compared by."""
    return next(iter(scores["held_out"].values()))


class EasyVqa:
    """easy-vqa (see `data.easy_vqa`): drawn shapes, several questions a picture, each judged as if asked alone."""

    def __init__(
        self,
        config: SphinxConfig,
        tokenizer_bytes: bytes | None,
        turns_per_picture: int = 4,
        *,
        validation_split: bool = False,
    ):
        """Without a tokenizer one is trained on the training questions.

        With `validation_split`, a tenth of the training pictures is held out and judged by, and the test set left alone.
        """
        if config.vision is None or config.vision.image_size != easy_vqa.IMAGE_SIZE:
            raise UserError("--data easy-vqa has pictures of 64 x 64 pixels, for the nano preset; choose --preset nano")
        self._train = easy_vqa.load("tuning" if validation_split else "train")
        self._held_out = easy_vqa.load("validation" if validation_split else "test")
        self._turns = turns_per_picture
        texts = easy_vqa.texts(self._train)
        self.tokenizer_bytes = tokenizer_bytes or train_tokenizer(texts, config.language.vocab_size)
        self._tokenizer = Tokenizer(self.tokenizer_bytes)
        self.examples = len(self._train)

    def name(self, example: int) -> str:
        return f"picture {self._train.ids[example]}"

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        table = easy_vqa.TurnTable.build(self._train, self._tokenizer)
        # Room for turns of average length and a little more: a turn that does not fit waits for another epoch.
        mean = sum(len(turn) for turn in table.tokens) / len(table.tokens)
        length = len(table.beginning) + max(round(self._turns * mean) + 6, table.longest())
        return easy_vqa.train_batches(self._train, self._tokenizer, batch_size, seed, length, self._turns)

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        table = easy_vqa.TurnTable.build(self._held_out, self._tokenizer)
        most = max(len(turns) for turns in table.of_record)
        longest = max(sum(len(table.tokens[t]) for t in turns) for turns in table.of_record)
        for start in range(0, len(self._held_out), batch_size):
            indices = range(start, min(start + batch_size, len(self._held_out)))
            length = len(table.beginning) + longest
            rows = [easy_vqa.sequence(table, table.of_record[i], length, most + 1) for i in indices]
            tokens, labels, turns = (np.stack(part) for part in zip(*rows, strict=True))
            images = self._held_out.images[np.asarray(indices)]
            yield {"images": images, "tokens": tokens, "labels": labels, "segment_ids": turns}

    def score(self, right: Sequence[np.ndarray], exists: Sequence[np.ndarray]) -> dict[str, Any]:
        questions = [question for _, question in self._held_out.pairs()]
        flags = [flag for row, there in zip(right, exists, strict=True) for flag in row[there]]
        predictions = [question.answer if flag else "" for question, flag in zip(questions, flags, strict=True)]
        return {
            "held_out": easy_vqa.score(questions, predictions),
            "blind": easy_vqa.blind_baseline(self._train, self._held_out),
        }


@dataclasses.dataclass(frozen=True)
class YamlOptions:
    """How one's own conversations are made into sequences."""

    max_length: int = 256
    """Longest sequence, image words included."""
    image_transform: ImageTransform = "pad"
    """Of training pictures; held-out ones are padded, as those that a model is asked about."""
    no_group_by_length: bool = False
    """Batches of all lengths, instead of neighbours in length."""
    pack: bool = False
    """Several conversations without pictures in one sequence, each seeing itself only."""
    workers: int = 2
    """Threads that read pictures and make batches."""


class YamlData:
    """One's own conversations, named by a `data.yaml` (see `data.accessory_yaml`); every tenth is held out."""

    def __init__(
        self,
        file: Path,
        config: SphinxConfig,
        tokenizer_bytes: bytes | None,
        skipped: SkippedRecords,
        options: YamlOptions = YamlOptions(),
    ):
        """Without a tokenizer one is trained on the conversations' text. What cannot be used goes to `skipped`."""
        annotations = accessory_yaml.read(file, skipped)
        if config.vision is None and any(item.image for item in annotations.items):
            raise UserError(f"{file} has pictures and the model sees none; choose a preset with encoders")
        _check_pictures(annotations)
        train, held_out = _split(annotations, file)
        self.tokenizer_bytes = tokenizer_bytes or _train_tokenizer(train, config.language.vocab_size, file)
        self._reader = ItemReader(
            Tokenizer(self.tokenizer_bytes),
            options.max_length,
            config.vision.image_size if config.vision else 0,
            config.num_image_tokens,
            skipped,
        )
        self._options = options
        self._train, self._held_out = self._reader.learnable(train), self._reader.learnable(held_out)
        self._rows = packed_rows(self._train, self._reader) if options.pack else None
        self.examples = len(self._rows.items if self._rows else self._train.items)

    def name(self, example: int) -> str:
        item = self._train.items[example]
        return item.where if item.id is None else f"{item.where} (id {item.id})"

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        return train_batches(
            self._train,
            self._reader,
            self._rows,
            batch_size=batch_size,
            seed=seed,
            image_transform=self._options.image_transform,
            no_group_by_length=self._options.no_group_by_length,
            workers=self._options.workers,
        )

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        return held_out_batches(self._held_out, self._reader, batch_size)

    def score(self, right: Sequence[np.ndarray], exists: Sequence[np.ndarray]) -> dict[str, Any]:
        flags = [flag for row, there in zip(right, exists, strict=True) for flag in row[there]]
        return {"held_out": {"accuracy": float(np.mean(flags))}}


def _split(annotations: Annotations, file: Path) -> tuple[Annotations, Annotations]:
    """Every tenth item of each type to the second part, so that it spans the lengths as the first does."""
    parts = []
    for held_out in (False, True):
        items, groups = [], {}
        for kind, group in annotations.groups.items():
            chosen = [annotations.items[i] for n, i in enumerate(group) if (n % 10 == 9) == held_out]
            groups[kind] = range(len(items), len(items) + len(chosen))
            items += chosen
        parts.append(Annotations(tuple(items), groups))
    if not parts[1].items:
        raise UserError(f"{file}: needs at least ten records of one type, since every tenth is held out; add records")
    return parts[0], parts[1]


def _check_pictures(annotations: Annotations) -> None:
    """Raises UserError if none of a hundred pictures of a type is there: a wrong root is said before training."""
    for kind, group in annotations.groups.items():
        looked_at = [annotations.items[i].image for i in group[:: max(len(group) // 100, 1)]]
        if looked_at[0] and not any(os.path.exists(image) for image in looked_at):
            raise UserError(
                f"none of the {len(looked_at)} pictures of type {kind!r} that were looked for is there, the first is "
                f"{looked_at[0]}; check root in the data.yaml"
            )


def _train_tokenizer(annotations: Annotations, vocab_size: int, file: Path) -> bytes:
    try:
        return train_tokenizer([item.conversation.text() for item in annotations.items], vocab_size)
    except ValueError as error:
        raise UserError(
            f"{file}: the conversations have too many different characters for a vocabulary of {vocab_size}; choose a "
            "larger preset, or --init with a checkpoint that has a tokenizer"
        ) from error
