"""The original's fine-tuning data: a `data.yaml` that names files of conversations.

    META:
      - path: conversations.json     # a list of records, or .jsonl with one a line, or an imagefolder
        type: image_text             # batches are drawn from one type at a time
        root: /data/images           # optional: put before every record's image
        ratio: 0.5                   # optional: the fraction of the records to use, drawn at random
        prompt: What is this?        # optional: the question of an imagefolder's texts

A record is {"image": "cat.png", "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}, without
"image" for text alone, or of the chat format (see `data.chat_messages`). An imagefolder is a directory with a
`metadata.jsonl`, whose images are below it. Relative paths are relative to the current directory, as in the original;
a leading `~` is the home directory.
"""

import contextlib
import dataclasses
import json
import os
import random
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sphinx_jax.data import chat_messages
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.images import is_data_url
from sphinx_jax.data.skipped_records import BadRecord, SkippedRecords
from sphinx_jax.errors import UserError

_KEYS = ("path", "type", "root", "ratio", "prompt")


@dataclasses.dataclass(frozen=True)
class Item:
    """One conversation, the path of its image if it has one, and its location in the data, for messages."""

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

    def select(self, predicate: Callable[[Item], bool]) -> "Annotations":
        """The items that satisfy `predicate`, in the same order."""
        items: list[Item] = []
        groups = {}
        for kind, group in self.groups.items():
            start = len(items)
            items += [self.items[i] for i in group if predicate(self.items[i])]
            groups[kind] = range(start, len(items))
        return Annotations(tuple(items), groups)


def read(config: str | Path, skipped: SkippedRecords) -> Annotations:
    """The items that a `data.yaml` names, in the original's order. Malformed ones are added to `skipped` instead.

    Raises UserError, which names file and entry, if a file is missing or malformed, on unknown keys and roles, on a
    conversation without an answer, on types that mix items with and without images, if too many items are malformed,
    and if nothing is left.
    """
    bad: list[BadRecord] = []
    groups: dict[str, list[Item]] = {}
    for number, entry in enumerate(_entries(config)):
        where = f"{config}: META entry {number}"
        meta = _check_entry(entry, where)
        path, root = Path(meta["path"]), meta.get("root")
        if path.is_dir():
            path, root = _metadata(path, where), root or str(path)
        records = _records(path, where)
        if "ratio" in meta:
            # Python's own generator and this seed: the same records as the original chooses.
            records = random.Random(0).sample(records, int(len(records) * meta["ratio"]))
        skipped.total += len(records)
        items = []
        for location, record in records:
            try:
                items.append(_item(record, location, root, meta.get("prompt")))
            except BadRecord as error:
                bad.append(error)
        groups.setdefault(meta["type"], []).extend(items)
    for error in bad:
        skipped.add(error.where, str(error))
    ordered: list[Item] = []
    ranges = {}
    for kind, items in groups.items():
        if not items:
            raise UserError(f"{config}: no records of type {kind!r} are left; add records or raise the ratio")
        if len({item.image is None for item in items}) > 1:
            first = next(item for item in items if (item.image is None) != (items[0].image is None))
            raise UserError(
                f"{first.where}: type {kind!r} mixes records with and without an image; give them types of their own"
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
        keys = sorted(map(str, parsed)) if isinstance(parsed, dict) else _shown(parsed)
        raise UserError(f"{config}: must hold one key, META, with a list of files under it; got {keys}")
    if not isinstance(parsed["META"], list) or not parsed["META"]:
        raise UserError(f"{config}: META must be a list of at least one entry with path and type")
    return parsed["META"]


def _check_entry(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must have the keys path and type, got {_shown(entry)}")
    unknown = sorted(str(key) for key in entry if key not in _KEYS)
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    for key in ("path", "type", "root", "prompt"):
        if not isinstance(entry.get(key, None if key in ("path", "type") else ""), str):
            raise UserError(f"{where}: {key!r} must be given as text, got {_shown(entry.get(key))}")
    checked = dict(entry)
    for key in ("path", "root"):
        if key in entry and not _can_be_a_path(entry[key]):
            raise UserError(f"{where}: {key!r} cannot be the name of a file, got {_shown(entry[key])}")
        if key in entry:
            checked[key] = os.path.expanduser(entry[key])
    if "ratio" in entry:
        checked["ratio"] = _ratio(entry["ratio"], where)
    return checked


def _ratio(value: Any, where: str) -> float:
    ratio = value
    if isinstance(value, str):
        # YAML takes numbers without a point, such as 1e-3, for text.
        with contextlib.suppress(ValueError):
            ratio = float(value)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise UserError(f"{where}: 'ratio' must be above 0 and at most 1, got {_shown(value)}")
    return float(ratio)


def _can_be_a_path(text: str) -> bool:
    """False for empty text, and for text with a NUL or half a surrogate pair."""
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


class _Line(str):
    """A line of a `.jsonl` file, not parsed yet: one malformed line leaves the others valid."""


def _records(path: Path, where: str) -> list[tuple[str, Any]]:
    """(location, record) of each record in a `.json` or `.jsonl` file; records of the latter are unparsed lines."""
    text = _read_text(path, f"the records of {where}")
    if path.suffix == ".jsonl":
        # Only '\n' ends a line of JSON: its strings may contain other line ends of Unicode.
        # A line may begin with a byte order mark where files were joined.
        lines = [_Line(line.removeprefix("\ufeff")) for line in text.split("\n")]
        return [(f"{path}, line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix != ".json":
        raise UserError(f"{path}: records must be in a .json or .jsonl file ({where})")
    parsed = _parse(text, str(path))
    if not isinstance(parsed, list):
        raise UserError(f"{path}: must be a list of records, got {_shown(parsed)}")
    return [(f"{path}, record {n}", record) for n, record in enumerate(parsed)]


def _metadata(folder: Path, where: str) -> Path:
    """The file that describes the images of a folder. Raises UserError if it has none."""
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: a directory of records needs a metadata.jsonl in it ({where})")
    return file


def _item(record: Any, where: str, root: str | None, prompt: str | None) -> Item:
    """Raises BadRecord on a malformed record; UserError on one that shows that the whole file has another format."""
    if isinstance(record, _Line):
        try:
            record = _parse(record, where)
        except UserError as error:
            raise BadRecord(where, str(error)) from error
    if not isinstance(record, dict):
        raise BadRecord(where, f'{where}: must be an object with "conversations" or "messages", got {_shown(record)}')
    named: list[str] = []
    if "conversations" in record:
        conversation = Conversation.from_record(record["conversations"], where)
        # Of the texts as they are written, whose order is the original's.
        characters = sum(len(str(turn["value"])) for turn in record["conversations"])
    else:
        if "messages" in record:
            conversation, named = chat_messages.read_messages(record["messages"], where)
        else:
            conversation = chat_messages.read_image_row(record, prompt, where)
        characters = sum(len(text) for text in (conversation.system or "", *(turn.text for turn in conversation.turns)))
    if not any(turn.role == "assistant" for turn in conversation.turns):
        raise UserError(f"{where}: no token has loss: there is no answer; add a turn from the assistant")
    image = chat_messages.image_of(record, named, where)
    if image is not None and (not isinstance(image, str) or not _can_be_a_path(image)):
        raise BadRecord(where, f'{where}: "image" must be the path of an image, got {_shown(image)}')
    if image is not None and not is_data_url(image):
        image = os.path.expanduser(image) if root is None else os.path.join(root, image)
    # Printed later, so half a surrogate pair is escaped.
    name = str(record["id"]).encode("utf-8", "backslashreplace").decode() if "id" in record else None
    return Item(where, conversation, image, name, characters)


def _read_text(path: Path, what: str) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: cannot read {what}: it is not a regular file")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text; save it as UTF-8"
        raise UserError(f"{path}: cannot read {what}: {reason}") from error
    if text.startswith("version https://git-lfs"):
        raise UserError(f"{path}: cannot read {what}: it is a git-lfs pointer; run git lfs pull")
    return text


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {_one_line(error)}") from error


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
