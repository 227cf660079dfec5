"""Batches of the conversations of a `data.yaml`: the order of the items, and their arrays."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int, UInt8

from sphinx_jax.data.accessory_yaml import Annotations, Item
from sphinx_jax.data.conversation import Example, fit
from sphinx_jax.data.dataset import Batch, prefetch
from sphinx_jax.data.images import (
    ImageTransform,
    data_url_bytes,
    is_data_url,
    load_image,
    padded_resize,
    random_resized_crop,
)
from sphinx_jax.data.packing import Packed, join, pack
from sphinx_jax.data.skipped_records import BadRecord, SkippedRecords
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

# Longer than any run; grain makes only the elements that are requested.
_ENDLESS = 1 << 40


def epoch_order(
    groups: dict[str, range],
    *,
    batch_size: int,
    grad_accum_steps: int = 1,
    replicas: int = 1,
    rank: int = 0,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
) -> Int[np.ndarray, "count"]:
    """The items of replica `rank` in an epoch; each `batch_size` consecutive ones are a batch.

    The items of one optimizer step over all replicas (replicas x grad_accum_steps x batch_size) are of one type and
    neighbours in length. These blocks are shuffled, the items in them are not. A last incomplete block of a type is
    left out of every epoch. The same indices as the original's sampler.
    """
    block = batch_size * replicas * grad_accum_steps
    blocks = [group[i : i + block] for group in groups.values() for i in range(0, len(group) - block + 1, block)]
    if shuffle:
        np.random.default_rng(seed + epoch).shuffle(blocks)
    batches = np.array(blocks, np.int64).reshape(-1, replicas, batch_size)
    return batches[:, rank].reshape(-1)


class TrainingSequences(NamedTuple):
    """The items of each training sequence, type by type: one, or several where they are packed."""

    items: tuple[tuple[int, ...], ...]
    groups: dict[str, range]


@dataclasses.dataclass(frozen=True)
class ItemReader:
    """Turns items into arrays of one shape: text truncated or padded, images decoded, squared and scaled."""

    tokenizer: Tokenizer
    max_length: int
    """Positions of a sequence, image tokens included."""
    image_size: int
    num_image_tokens: int
    skipped: SkippedRecords

    def text(self, item: Item) -> Example:
        """Raises BadRecord or UserError as `conversation.fit` does."""
        num_image_tokens = self.num_image_tokens if item.image else 0
        return fit(item.conversation.example(self.tokenizer), self.max_length, num_image_tokens, item.where)

    def packed(self, items: Sequence[Item]) -> Packed:
        """Items without images in one sequence."""
        return join([item.conversation.example(self.tokenizer) for item in items], self.max_length)

    def image(self, item: Item, random: np.random.Generator | None = None) -> UInt8[np.ndarray, "size size 3"] | None:
        """The item's image, padded to a square, or cropped with `random`; None, and the item skipped, on an error."""
        if item.image is None:
            return None
        try:
            image = load_image(data_url_bytes(item.image) if is_data_url(item.image) else item.image)
        except UserError as error:
            self.skipped.add(item.where, f"{item.where}: {error}")
            return None
        return random_resized_crop(image, self.image_size, random) if random else padded_resize(image, self.image_size)

    def can_load(self, item: Item) -> bool:
        """Whether the item has no image, or one that loads; the item is skipped if not."""
        return item.image is None or self.image(item) is not None

    def select_with_loss(self, annotations: Annotations) -> Annotations:
        """The items with loss left after truncation; the others are skipped.

        Raises UserError if too many are skipped, or if image tokens leave no room for text.
        """
        return annotations.select(self._has_loss)

    def _has_loss(self, item: Item) -> bool:
        num_text_tokens = self.max_length - (self.num_image_tokens if item.image else 0)
        # A token holds at least one byte, BOS and the space before the text excepted: few items need the tokenizer.
        if len(item.conversation.segments()[0].text.encode()) + 2 < num_text_tokens:
            return True
        try:
            self.text(item)
        except BadRecord as error:
            self.skipped.add(error.where, str(error))
            return False
        return True


def unpacked_sequences(annotations: Annotations) -> TrainingSequences:
    """One sequence per item."""
    return TrainingSequences(tuple((i,) for i in range(len(annotations.items))), annotations.groups)


def packed_sequences(annotations: Annotations, reader: ItemReader) -> TrainingSequences:
    """Items without images packed into as few sequences as fit; one sequence per item with an image.

    Tokenises all text once. Raises UserError if every type has images.
    """
    if all(item.image for item in annotations.items):
        raise UserError("--pack: every conversation has an image, and only those without are packed; leave it out")
    sequences: list[tuple[int, ...]] = []
    groups = {}
    for kind, group in annotations.groups.items():
        start = len(sequences)
        if group and annotations.items[group[0]].image is None:
            lengths = [len(annotations.items[i].conversation.example(reader.tokenizer).tokens) for i in group]
            bins = pack(lengths, reader.max_length)
            # Bins are ordered from long to short conversations; shuffled, a batch has both.
            order = np.random.default_rng(0).permutation(len(bins))
            sequences += [tuple(group.start + i for i in bins[n]) for n in order]
        else:
            sequences += [(i,) for i in group]
        groups[kind] = range(start, len(sequences))
    return TrainingSequences(tuple(sequences), groups)


def held_out_batches(annotations: Annotations, reader: ItemReader, batch_size: int) -> Iterator[Batch]:
    """Every item once, in order, in batches of one type and at most `batch_size`; see `train_batches`.

    Items whose image cannot be loaded are skipped.
    """
    for group in annotations.groups.values():
        for start in range(group.start, group.stop, batch_size):
            items = annotations.items[start : min(start + batch_size, group.stop)]
            pairs = [(item, reader.image(item)) for item in items]
            loaded = [(item, image) for item, image in pairs if item.image is None or image is not None]
            if loaded:
                yield _stack([reader.text(item) for item, _ in loaded], [image for _, image in loaded])


def _stack(examples: Sequence[Example], images: Sequence[UInt8[np.ndarray, "size size 3"] | None]) -> Batch:
    batch = {
        "tokens": np.stack([example.tokens for example in examples]),
        "labels": np.stack([example.labels for example in examples]),
    }
    present = [image for image in images if image is not None]
    return batch | {"images": np.stack(present)} if present else batch


def train_batches(
    annotations: Annotations,
    reader: ItemReader,
    sequences: TrainingSequences | None = None,
    *,
    batch_size: int,
    seed: int,
    image_transform: ImageTransform = "pad",
    no_group_by_length: bool = False,
    grad_accum_steps: int = 1,
    replicas: int = 1,
    rank: int = 0,
    workers: int = 2,
) -> grain.DatasetIterator[Batch]:
    """An endless, resumable iterator of training batches, each of one type; the same seed gives the same batches,
    whatever the number of `workers`, the threads that make them.

    Each batch: "tokens" and "labels" int32[B, T] as `conversation.fit` makes them; for types with images "images"
    uint8[B, image_size, image_size, 3]; and "examples" int[N], indices into `annotations.items`. T is `max_length`,
    less `num_image_tokens` where there are images. `sequences` are as `unpacked_sequences` (the default) or
    `packed_sequences` makes them; packed text has "segment_ids" int32[B, T] too (see `packing.Packed`), and N is larger
    than B. A batch has neighbours in length, or with `no_group_by_length` items of all lengths, redrawn each epoch. An
    item whose image cannot be loaded is skipped, and the next of its type replaces it. `grad_accum_steps` consecutive
    batches are of one type. Of several processes, each takes the batches of its `rank`. Raises UserError if no type
    fills a step, and while iterating if too many items are skipped.
    """
    packed = sequences is not None
    used = sequences or unpacked_sequences(annotations)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Int[np.ndarray, "batches batch_size"]:
        chosen = epoch_order(
            used.groups,
            batch_size=batch_size,
            grad_accum_steps=grad_accum_steps,
            replicas=replicas,
            rank=rank,
            seed=seed,
            epoch=epoch,
        )
        if no_group_by_length:
            random = np.random.default_rng((seed, epoch))
            chosen = np.concatenate([random.permutation(group) for group in used.groups.values()])[chosen]
        return chosen.reshape(-1, batch_size)

    batches_per_epoch = len(order(0))
    if not batches_per_epoch:
        largest, kind = max(map(len, used.groups.values())), "packed sequences" if packed else "records"
        raise UserError(
            f"the largest type has {largest} {kind}, too few for one step of "
            f"{batch_size * grad_accum_steps * replicas} (batch size x accumulation x processes); choose a smaller "
            "batch size"
        )

    def load(example: int, random: np.random.Generator | None) -> tuple[int, UInt8[np.ndarray, "size size 3"]]:
        """The item and its image, or of the next items of its type the first whose image loads."""
        group = next(group for group in annotations.groups.values() if example in group)
        for i in range(len(group)):
            candidate = group.start + (example - group.start + i) % len(group)
            image = reader.image(annotations.items[candidate], random)
            if image is not None:
                return candidate, image
        raise UserError(f"no image of the type of {annotations.items[example].where} can be loaded; check its root")

    def make_batch(number: int) -> Batch:
        epoch, position = divmod(number, batches_per_epoch)
        chosen = [used.items[i] for i in order(epoch)[position]]
        examples = [i for indices in chosen for i in indices]
        images: list[UInt8[np.ndarray, "size size 3"]] = []
        if annotations.items[examples[0]].image is not None:
            # Seeded by the batch's number: workers and resuming do not change the crops.
            random = np.random.default_rng((seed, rank, number)) if image_transform == "crop" else None
            loaded = [load(i, random) for i in examples]
            examples, images = [i for i, _ in loaded], [image for _, image in loaded]
        elif packed:
            joined = [reader.packed([annotations.items[i] for i in indices]) for indices in chosen]
            arrays = {name: np.stack([sequence._asdict()[name] for sequence in joined]) for name in Packed._fields}
            return arrays | {"examples": np.array(examples)}
        return _stack([reader.text(annotations.items[i]) for i in examples], images) | {"examples": np.array(examples)}

    return prefetch(grain.MapDataset.range(_ENDLESS).map(make_batch), workers)
