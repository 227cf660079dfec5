"""The original's fine-tuning data: a `data.yaml` that names files of LLaVA-style conversations.

    META:
      - path: conversations.json     # a list of records, or .jsonl with one a line
        type: image_text             # batches are drawn from one type at a time
        root: /data/pictures         # optional: put before every record's "image"
        ratio: 0.5                   # optional: the share of the records to use, chosen at random

A record is {"image": "cat.png", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}, without
"image" for text alone. Relative paths start from the current directory, as in the original.
"""

import dataclasses
import functools
import json
import os
import random
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import yaml
from jaxtyping import Int

from sphinx_jax.data.conversation import Conversation, fit
from sphinx_jax.data.dataset import Batch, read_ahead
from sphinx_jax.data.images import open_image, padded_resize
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

# Far beyond any run; grain only looks at the elements that it is asked for.
_ENDLESS = 1 << 40


@dataclasses.dataclass(frozen=True)
class Item:
    """One conversation, the path of its picture if it has one, and where it was read, for errors."""

    where: str
    conversation: Conversation
    image: str | None
    id: str | None
    characters: int


@dataclasses.dataclass(frozen=True)
class Annotations:
    """All items, type by type, each type from its shortest conversation to its longest."""

    items: tuple[Item, ...]
    groups: dict[str, range]


def read(config: str | Path) -> Annotations:
    """The items that a `data.yaml` names, in the original's order.

    Raises UserError, which names file and entry, if a file is missing or malformed, on unknown keys, on types
    that mix items with and without pictures, and if nothing is left.
    """
    groups: dict[str, list[Item]] = {}
    for number, entry in enumerate(_entries(config)):
        where = f"{config}: META entry {number}"
        meta = _check_entry(entry, where)
        records = _records(Path(meta["path"]), where)
        if "ratio" in meta:
            # Python's own generator and this seed: the same records as the original chooses.
            records = random.Random(0).sample(records, int(len(records) * meta["ratio"]))
        items = [_item(record, place, meta.get("root")) for place, record in records]
        groups.setdefault(meta["type"], []).extend(items)
    ordered: list[Item] = []
    ranges = {}
    for kind, items in groups.items():
        if not items:
            raise UserError(f"{config}: no records of type {kind!r} are left; add records or raise the ratio")
        if len({item.image is None for item in items}) > 1:
            first = next(item for item in items if (item.image is None) != (items[0].image is None))
            raise UserError(
                f"{first.where}: type {kind!r} mixes records with and without a picture; give them types of their own"
            )
        ranges[kind] = range(len(ordered), len(ordered) + len(items))
        ordered += sorted(items, key=lambda item: item.characters)
    return Annotations(tuple(ordered), ranges)


def _entries(config: str | Path) -> list[Any]:
    text = _read_text(Path(config), "the data description")
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{config}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(parsed, dict) or set(parsed) != {"META"}:
        keys = sorted(map(str, parsed)) if isinstance(parsed, dict) else reprlib.repr(parsed)
        raise UserError(f"{config}: must hold one key, META, with a list of files under it; got {keys}")
    if not isinstance(parsed["META"], list) or not parsed["META"]:
        raise UserError(f"{config}: META must be a list of at least one entry with path and type")
    return parsed["META"]


def _check_entry(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must have the keys path and type, got {reprlib.repr(entry)}")
    unknown = sorted(str(key) for key in entry if key not in ("path", "type", "root", "ratio"))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are path, type, root, ratio")
    for key in ("path", "type", "root"):
        if not isinstance(entry.get(key, "" if key == "root" else None), str):
            raise UserError(f"{where}: {key!r} must be given as text, got {reprlib.repr(entry.get(key))}")
    ratio = entry.get("ratio", 1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise UserError(f"{where}: 'ratio' must be above 0 and at most 1, got {reprlib.repr(ratio)}")
    return entry


def _records(path: Path, where: str) -> list[tuple[str, Any]]:
    """(where it stands, record) of each record in a `.json` or `.jsonl` file."""
    text = _read_text(path, f"the records of {where}")
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [(place, _parse(line, place)) for place, line in lines]
    if path.suffix != ".json":
        raise UserError(f"{path}: records must be in a .json or .jsonl file ({where})")
    parsed = _parse(text, str(path))
    if not isinstance(parsed, list):
        raise UserError(f"{path}: must be a list of records, got {reprlib.repr(parsed)}")
    return [(f"{path}, record {n}", record) for n, record in enumerate(parsed)]


def _item(record: Any, where: str, root: str | None) -> Item:
    if not isinstance(record, dict) or "conversations" not in record:
        raise UserError(f'{where}: must be an object with "conversations", got {reprlib.repr(record)}')
    conversation = Conversation.from_record(record["conversations"], where)
    image = record.get("image")
    if image is not None and (not isinstance(image, str) or not image or "\0" in image):
        raise UserError(f'{where}: "image" must be the path of a picture, got {reprlib.repr(image)}')
    if image is not None and root is not None:
        image = os.path.join(root, image)
    characters = sum(len(str(turn["value"])) for turn in record["conversations"])
    return Item(where, conversation, image, str(record["id"]) if "id" in record else None, characters)


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot read {what}: {reason}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def epoch_order(
    groups: dict[str, range],
    *,
    batch_size: int,
    accumulate: int = 1,
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
    block = batch_size * replicas * accumulate
    blocks = [group[i : i + block] for group in groups.values() for i in range(0, len(group) - block + 1, block)]
    if shuffle:
        np.random.default_rng(seed + epoch).shuffle(blocks)
    batches = np.array(blocks, np.int64).reshape(-1, replicas, batch_size)
    return batches[:, rank].reshape(-1)


def collate(
    items: Sequence[Item], tokenizer: Tokenizer, *, max_length: int, image_size: int, image_words: int
) -> Batch:
    """One batch of items of one type (see `train_batches`). Raises UserError as iterating over that does."""
    pictures = items[0].image is not None
    words = image_words if pictures else 0
    rows = [fit(item.conversation.example(tokenizer), max_length, words, item.where) for item in items]
    batch = {"tokens": np.stack([row.tokens for row in rows]), "labels": np.stack([row.labels for row in rows])}
    if pictures:
        batch["images"] = np.stack([padded_resize(open_image(item.image), image_size) for item in items])
    return batch


def train_batches(
    annotations: Annotations,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    max_length: int,
    image_size: int,
    image_words: int,
    accumulate: int = 1,
    replicas: int = 1,
    rank: int = 0,
    threads: int = 2,
) -> grain.DatasetIterator[Batch]:
    """An endless, resumable iterator of training batches, each of one type; the same seed gives the same batches.

    Each batch: "tokens" and "labels" int32[B, T] as `conversation.fit` makes them, for types with pictures "images"
    uint8[B, image_size, image_size, 3], padded and resized, and "examples" int[B], the places in `annotations.items`.
    T is `max_length`, less `image_words` where there are pictures. `accumulate` batches in a row are of one type. Of
    several processes, each takes the batches of its `rank`. Raises UserError if no type fills a step, and while
    iterating if a picture cannot be opened or a conversation has nothing to learn.
    """

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Int[np.ndarray, "batches batch_size"]:
        sizes = {"batch_size": batch_size, "accumulate": accumulate, "replicas": replicas, "rank": rank}
        return epoch_order(annotations.groups, **sizes, seed=seed, epoch=epoch).reshape(-1, batch_size)

    batches = len(order(0))
    if not batches:
        largest = max(map(len, annotations.groups.values()))
        raise UserError(
            f"the largest type has {largest} records, too few for one step of {batch_size * accumulate * replicas} "
            f"(batch size x accumulation x processes); choose a smaller batch size"
        )

    def make_batch(number: int) -> Batch:
        epoch, position = divmod(number, batches)
        examples = order(epoch)[position]
        items = [annotations.items[i] for i in examples]
        batch = collate(items, tokenizer, max_length=max_length, image_size=image_size, image_words=image_words)
        return batch | {"examples": examples}

    return read_ahead(grain.MapDataset.range(_ENDLESS).map(make_batch), threads)
