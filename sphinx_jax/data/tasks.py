"""What a run trains and evaluates on: one small interface, and the two kinds of data that implement it."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from sphinx_jax.config import SphinxConfig
from sphinx_jax.data import accessory_yaml, easy_vqa, easy_vqa_sequences
from sphinx_jax.data.accessory_yaml import Annotations, Item
from sphinx_jax.data.batching import ItemReader, held_out_batches, packed_sequences, train_batches
from sphinx_jax.data.dataset import Batch
from sphinx_jax.data.images import ImageTransform, is_data_url
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tokenizer import train_tokenizer
from sphinx_jax.data.tokenizer_files import load_tokenizer
from sphinx_jax.errors import UserError

log = logging.getLogger(__name__)


@runtime_checkable
class Task(Protocol):
    """Training batches, held-out batches, and the accuracy on these."""

    tokenizer_files: Mapping[str, bytes]
    """The tokenizer, as the files of a checkpoint: names to contents."""
    examples: int
    """Sequences in one epoch."""
    fingerprint: str
    """A digest of the examples: of other data a run cannot be resumed."""

    def name(self, example: int) -> str:
        """The name of a training example in messages; batches hold their indices in "examples"."""
        ...

    def batches(self, batch_size: int, seed: int) -> grain.DatasetIterator[Batch]:
        """Endless training batches; the iterator has `get_state` and `set_state`."""
        ...

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        """The held-out examples once, in order; a batch may be smaller."""
        ...

    def evaluate(self, right: Sequence[np.ndarray], exists: Sequence[np.ndarray]) -> dict[str, Any]:
        """Held-out accuracies for `summary.json`.

        `right` and `exists` hold a bool[answers] for each held-out example: which of its answers are right, and which
        there are at all.
        """
        ...


def primary_accuracy(results: dict[str, Any]) -> float | None:
    """The accuracy that checkpoints are compared by; None where nothing is held out."""
    return next(iter(results["held_out"].values()))


class EasyVqa:
    """easy-vqa (see `data.easy_vqa`): drawn shapes, several conversations per image, each trained as if alone."""

    def __init__(
        self,
        config: SphinxConfig,
        tokenizer_files: Mapping[str, bytes] | None,
        conversations_per_image: int = 4,
        *,
        validation_split: bool = False,
    ):
        """Without a tokenizer, one is trained on the training questions and phrasings; it ignores case.

        With `validation_split`, a tenth of the training images is held out for evaluation, instead of the test set.
        """
        if config.vision is None or config.vision.image_size != easy_vqa.IMAGE_SIZE:
            raise UserError("--data easy-vqa has images of 64 x 64 pixels, for the nano preset; choose --preset nano")
        self._train = easy_vqa.load("tuning" if validation_split else "train")
        self._held_out = easy_vqa.load("validation" if validation_split else "test")
        self._conversations_per_image = conversations_per_image
        vocab_size = config.language.vocab_size
        self.tokenizer_files = tokenizer_files or {
            "tokenizer.model": train_tokenizer(easy_vqa.texts(self._train), vocab_size, fold_case=True)
        }
        self._tokenizer = load_tokenizer(self.tokenizer_files, vocab_size, "the run")
        self.examples = len(self._train)
        self.fingerprint = f"easy-vqa, {'validation split' if validation_split else 'test set'}"

    def name(self, example: int) -> str:
        return f"image {self._train.ids[example]}"

    def batches(self, batch_size: int, seed: int) -> grain.DatasetIterator[Batch]:
        count = self._conversations_per_image
        length = easy_vqa_sequences.sequence_length(self._train, self._tokenizer, count)
        return easy_vqa_sequences.train_batches(self._train, self._tokenizer, batch_size, seed, length, count)

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        sequences = easy_vqa_sequences.held_out_sequences(self._held_out, self._tokenizer)
        for start in range(0, len(sequences), batch_size):
            chosen = sequences[start : start + batch_size]
            arrays = {name: np.stack([sequence._asdict()[name] for sequence in chosen]) for name in chosen[0]._fields}
            yield {"images": self._held_out.images[start : start + batch_size], **arrays}

    def evaluate(self, right: Sequence[np.ndarray], exists: Sequence[np.ndarray]) -> dict[str, Any]:
        questions = [question for _, question in self._held_out.pairs()]
        flags = _existing(right, exists)
        predictions = [question.answer if flag else "" for question, flag in zip(questions, flags, strict=True)]
        return {
            "held_out": easy_vqa.accuracy(questions, predictions),
            "blind": easy_vqa.accuracy_without_images(self._train, self._held_out),
        }


@dataclasses.dataclass(frozen=True)
class YamlOptions:
    """How the conversations of a data.yaml become sequences and batches."""

    max_length: int = 256
    """data.yaml: longest sequence of one conversation, in tokens, image tokens included."""
    image_transform: ImageTransform = "pad"
    """data.yaml: how training images become square: pad, or random crop. Held-out images are padded."""
    no_group_by_length: bool = False
    """data.yaml: mix lengths within a batch instead of grouping conversations by length. Needed where the length
    reveals the answer, as with class labels."""
    pack: bool = False
    """data.yaml: pack several conversations without images into one sequence; attention stays within each of them."""
    workers: int = 2
    """data.yaml: threads that decode images and build batches."""


def _fingerprint(items: Sequence[Item]) -> str:
    """A digest of what the items say and which images they name, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(repr((item.conversation.turns, item.image)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


class YamlData:
    """One's own conversations, named by a `data.yaml` (see `data.accessory_yaml`); about every tenth is held out."""

    def __init__(
        self,
        file: Path,
        config: SphinxConfig,
        tokenizer_files: Mapping[str, bytes] | None,
        skipped: SkippedRecords,
        options: YamlOptions = YamlOptions(),
    ):
        """Without a tokenizer, one is trained on the conversations' text. Unusable records are added to `skipped`."""
        annotations = accessory_yaml.read(file, skipped)
        if config.vision is None and any(item.image for item in annotations.items):
            raise UserError(f"{file} has images and the model has no encoders; choose a preset with encoders")
        _check_images(annotations)
        train, held_out = split_held_out(annotations, file)
        vocab_size = config.language.vocab_size
        self.tokenizer_files = tokenizer_files or {"tokenizer.model": _train_tokenizer(train, vocab_size, file)}
        self._reader = ItemReader(
            load_tokenizer(self.tokenizer_files, vocab_size, "the run"),
            options.max_length,
            config.vision.image_size if config.vision else 0,
            config.num_image_tokens,
            skipped,
        )
        self._options = options
        self._train = self._reader.select_with_loss(train)
        self._held_out = self._reader.select_with_loss(held_out)
        if not any(self._reader.can_load(item) for item in self._held_out.items):
            log.warning("%s: no held-out record can be used, so the run ends without an accuracy", file)
        self.fingerprint = _fingerprint([*self._train.items, *self._held_out.items])
        self._sequences = packed_sequences(self._train, self._reader) if options.pack else None
        self.examples = len(self._sequences.items if self._sequences else self._train.items)

    def name(self, example: int) -> str:
        item = self._train.items[example]
        return item.where if item.id is None else f"{item.where} (id {item.id})"

    def batches(self, batch_size: int, seed: int) -> grain.DatasetIterator[Batch]:
        return train_batches(
            self._train,
            self._reader,
            self._sequences,
            batch_size=batch_size,
            seed=seed,
            image_transform=self._options.image_transform,
            no_group_by_length=self._options.no_group_by_length,
            workers=self._options.workers,
        )

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        return held_out_batches(self._held_out, self._reader, batch_size)

    def evaluate(self, right: Sequence[np.ndarray], exists: Sequence[np.ndarray]) -> dict[str, Any]:
        flags = _existing(right, exists)
        return {"held_out": {"accuracy": float(np.mean(flags)) if flags else None}}


def _existing(right: Sequence[np.ndarray], exists: Sequence[np.ndarray]) -> list[bool]:
    return [bool(flag) for flags, mask in zip(right, exists, strict=True) for flag in flags[mask]]


def split_held_out(annotations: Annotations, file: Path) -> tuple[Annotations, Annotations]:
    """The items in two parts, to train on and to hold out: every tenth image or text of each type is held out.

    All items about one image are in one part, also across types and where a file is listed twice. Items without an
    image are identified by their questions; if fewer than ten differ in a type, by their whole text. Images are counted
    from the shortest conversation to the longest, so that both parts span all lengths.
    Raises UserError if nothing would be held out.
    """
    held_out: dict[str, bool] = {}
    for group in annotations.groups.values():
        new = list(dict.fromkeys(key for key in _identities(annotations, group) if key not in held_out))
        held_out |= {key: n % 10 == 9 for n, key in enumerate(new)}
    chosen: set[int] = set()
    for group in annotations.groups.values():
        chosen |= {i for i, key in zip(group, _identities(annotations, group), strict=True) if held_out[key]}
    if not chosen:
        raise UserError(
            f"{file}: needs at least ten different images or texts of one type, since every tenth is held out; "
            "add records"
        )
    indices = {id(item): i for i, item in enumerate(annotations.items)}
    return (
        annotations.select(lambda item: indices[id(item)] not in chosen),
        annotations.select(lambda item: indices[id(item)] in chosen),
    )


def _identities(annotations: Annotations, group: range) -> list[str]:
    """What identifies the image or text of each item of a type."""
    items = [annotations.items[i] for i in group]
    if items and items[0].image is not None:
        return [f"image {_absolute(item.image)}" for item in items if item.image is not None]
    questions = ["\n".join(turn.text for turn in item.conversation.turns if turn.role == "human") for item in items]
    if len(set(questions)) < 10:
        questions = [item.conversation.text() for item in items]
    return [f"text {question}" for question in questions]


def _absolute(image: str) -> str:
    """One name of an image, links followed; a data: URL is its own."""
    return image if is_data_url(image) else os.path.realpath(image)


def _check_images(annotations: Annotations) -> None:
    """Raises UserError if none of a hundred images of a type exists: a wrong root is reported before training."""
    for kind, group in annotations.groups.items():
        paths = [annotations.items[i].image for i in group[:: max(len(group) // 100, 1)]]
        images = [path for path in paths if path is not None and not is_data_url(path)]
        if images and not any(os.path.exists(image) for image in images):
            raise UserError(
                f"of type {kind!r}, none of {len(images)} images exists, the first is {images[0]}; check root in the "
                "data.yaml"
            )


def _train_tokenizer(annotations: Annotations, vocab_size: int, file: Path) -> bytes:
    try:
        return train_tokenizer([item.conversation.text() for item in annotations.items], vocab_size)
    except ValueError as error:
        raise UserError(
            f"{file}: the conversations have too many different characters for a vocabulary of {vocab_size}; choose a "
            "larger preset, or --init with a checkpoint that has a tokenizer"
        ) from error
