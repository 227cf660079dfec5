"""Batches of conversations of a `data.yaml`: which items, in which order, and made into arrays."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int, UInt8

from sphinx_jax.data.accessory_yaml import Annotations, Item
from sphinx_jax.data.conversation import Example, fit
from sphinx_jax.data.dataset import Batch, read_ahead
from sphinx_jax.data.images import ImageTransform, open_image, padded_resize, random_resized_crop
from sphinx_jax.data.packing import Packed, join, pack
from sphinx_jax.data.skipped_records import BadRecord, SkippedRecords
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

# Far beyond any run; grain only looks at the elements that it is asked for.
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
    """The items that replica `rank` sees in an epoch: each run of `batch_size` is one of its batches.

    What all replicas take for one optimizer step (replicas x accumulate x batch_size items) is of one type and
    of neighbours in length; those blocks are shuffled, their items are not. What fills no block is left out of
    every epoch. The same indices as the original's sampler gives.
    """
    block = batch_size * replicas * grad_accum_steps
    blocks = [group[i : i + block] for group in groups.values() for i in range(0, len(group) - block + 1, block)]
    if shuffle:
        np.random.default_rng(seed + epoch).shuffle(blocks)
    batches = np.array(blocks, np.int64).reshape(-1, replicas, batch_size)
    return batches[:, rank].reshape(-1)


class Rows(NamedTuple):
    """Which items stand in each sequence, type by type: one, or several where they are packed."""

    items: tuple[tuple[int, ...], ...]
    groups: dict[str, range]


@dataclasses.dataclass(frozen=True)
class ItemReader:
    """Turns items into arrays of one shape: text cut or padded, pictures read, squared and scaled."""

    tokenizer: Tokenizer
    max_length: int
    """Positions of a sequence, image words included."""
    image_size: int
    num_image_tokens: int
    skipped: SkippedRecords

    def text(self, item: Item) -> Example:
        """Raises UserError if nothing to learn is left, as `conversation.fit` does."""
        words = self.num_image_tokens if item.image else 0
        return fit(item.conversation.example(self.tokenizer), self.max_length, words, item.where)

    def packed(self, items: Sequence[Item]) -> Packed:
        """Items without pictures in one sequence."""
        return join([item.conversation.example(self.tokenizer) for item in items], self.max_length)

    def picture(self, item: Item, crop: np.random.Generator | None = None) -> UInt8[np.ndarray, "size size 3"] | None:
        """The item's picture, whole or cropped at random; None, and the item skipped, if it does not open."""
        try:
            image = open_image(item.image)
        except UserError as error:
            self.skipped.add(item.where, f"{item.where}: {error}")
            return None
        return random_resized_crop(image, self.image_size, crop) if crop else padded_resize(image, self.image_size)

    def learnable(self, annotations: Annotations) -> Annotations:
        """The items of which something to learn is left; the others are skipped.

        Raises UserError if those are too many, or if pictures leave no room for text.
        """

        def keep(item: Item) -> bool:
            room = self.max_length - (self.num_image_tokens if item.image else 0)
            # A token holds at least a byte, beside BOS and the space before the text: few need to be tokenised.
            if len(item.conversation.segments()[0].text.encode()) + 2 < room:
                return True
            try:
                self.text(item)
            except BadRecord as error:
                self.skipped.add(error.where, str(error))
                return False
            return True

        return annotations.select(keep)


def plain_rows(annotations: Annotations) -> Rows:
    """A sequence for every item."""
    return Rows(tuple((i,) for i in range(len(annotations.items))), annotations.groups)


def packed_rows(annotations: Annotations, reader: ItemReader) -> Rows:
    """Items without pictures packed into as few sequences as fit; a sequence for every item with one.

    Tokenises all text once. Raises UserError if every type has pictures.
    """
    rows: list[tuple[int, ...]] = []
    groups = {}
    for kind, group in annotations.groups.items():
        start = len(rows)
        if group and annotations.items[group[0]].image is None:
            lengths = [len(annotations.items[i].conversation.example(reader.tokenizer).tokens) for i in group]
            packed = pack(lengths, reader.max_length)
            # Packing goes from long to short; a batch shall have of both.
            shuffled = np.random.default_rng(0).permutation(len(packed))
            rows += [tuple(group.start + i for i in packed[n]) for n in shuffled]
        else:
            rows += [(i,) for i in group]
        groups[kind] = range(start, len(rows))
    if all(item.image for item in annotations.items):
        raise UserError("--pack: every conversation has a picture, and only those without are packed; leave it out")
    return Rows(tuple(rows), groups)


def held_out_batches(annotations: Annotations, reader: ItemReader, batch_size: int) -> Iterator[Batch]:
    """Every item once, in order, each batch of one type and at most `batch_size`; see `train_batches`."""
    for group in annotations.groups.values():
        for start in range(group.start, group.stop, batch_size):
            items = annotations.items[start : min(start + batch_size, group.stop)]
            pictures = [reader.picture(item) if item.image else None for item in items]
            pairs = zip(items, pictures, strict=True)
            usable = [(item, picture) for item, picture in pairs if not item.image or picture is not None]
            if usable:
                yield _stack([reader.text(item) for item, _ in usable], [picture for _, picture in usable])


def _stack(rows: Sequence[Example], pictures: Sequence[UInt8[np.ndarray, "size size 3"] | None]) -> Batch:
    batch = {"tokens": np.stack([row.tokens for row in rows]), "labels": np.stack([row.labels for row in rows])}
    return batch if pictures[0] is None else batch | {"images": np.stack(pictures)}


def train_batches(
    annotations: Annotations,
    reader: ItemReader,
    rows: Rows | None = None,
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

    Each batch: "tokens" and "labels" int32[B, T] as `conversation.fit` makes them, for types with pictures "images"
    uint8[B, image_size, image_size, 3], and "examples" int[N], the places in `annotations.items`. T is `max_length`,
    less `num_image_tokens` where there are pictures. `rows` are as `plain_rows` or `packed_rows` makes them; packed, text
    has "segment_ids" int32[B, T] too (see `packing.Packed`), and N is larger than B. A batch has neighbours in length, or
    with `no_group_by_length` items of all lengths, drawn anew each epoch. An item whose picture does not open is skipped,
    and the next of its type that has one takes its place. `grad_accum_steps` batches in a row are of one type. Of several
    processes, each takes the batches of its `rank`. Raises UserError if no type fills a step, and while iterating if
    too many items are skipped.
    """

    packed = rows is not None
    rows = rows or plain_rows(annotations)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Int[np.ndarray, "batches batch_size"]:
        sizes = {"batch_size": batch_size, "grad_accum_steps": grad_accum_steps, "replicas": replicas, "rank": rank}
        chosen = epoch_order(rows.groups, **sizes, seed=seed, epoch=epoch)
        if no_group_by_length:
            random = np.random.default_rng((seed, epoch))
            chosen = np.concatenate([random.permutation(group) for group in rows.groups.values()])[chosen]
        return chosen.reshape(-1, batch_size)

    batches = len(order(0))
    if not batches:
        largest, kind = max(map(len, rows.groups.values())), "packed sequences" if packed else "records"
        raise UserError(
            f"the largest type has {largest} {kind}, too few for one step of {batch_size * grad_accum_steps * replicas} "
            f"(batch size x accumulation x processes); choose a smaller batch size"
        )

    def usable(example: int, random: np.random.Generator | None) -> tuple[int, UInt8[np.ndarray, "size size 3"]]:
        group = next(group for group in annotations.groups.values() if example in group)
        for i in range(len(group)):
            candidate = group.start + (example - group.start + i) % len(group)
            picture = reader.picture(annotations.items[candidate], random)
            if picture is not None:
                return candidate, picture
        raise UserError(f"no picture of the type of {annotations.items[example].where} can be opened; check its root")

    def make_batch(number: int) -> Batch:
        epoch, position = divmod(number, batches)
        chosen = [rows.items[i] for i in order(epoch)[position]]
        examples, pictures = [i for row in chosen for i in row], [None] * batch_size
        if annotations.items[examples[0]].image:
            # Drawn by the batch's number: neither the workers nor a resume changes what is drawn.
            random = np.random.default_rng((seed, rank, number)) if image_transform == "crop" else None
            examples, pictures = zip(*(usable(i, random) for i in examples), strict=True)
        elif packed:
            joined = [reader.packed([annotations.items[i] for i in row]) for row in chosen]
            arrays = {name: np.stack([getattr(row, name) for row in joined]) for name in Packed._fields}
            return arrays | {"examples": np.array(examples)}
        texts = [reader.text(annotations.items[i]) for i in examples]
        return _stack(texts, pictures) | {"examples": np.array(examples)}

    return read_ahead(grain.MapDataset.range(_ENDLESS).map(make_batch), workers)
