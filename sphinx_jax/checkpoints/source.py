"""An opened checkpoint of any format: what it says about itself, before any weight is read."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sphinx_jax.checkpoints.io.mapped_file import MappedFile
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.config import SphinxConfig
from sphinx_jax.errors import UserError

_FEW_PROBLEMS = 30


class Tensor(Protocol):
    """Part of a file: a numpy array mapped from it, or something that reads when it is indexed."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What is added to a checkpoint's matrices when they are read: scale x a b.

    `factors` are (a, b) by the path of the matrix, those of all layers stacked (see `layers.LowRank`).
    """

    scale: float
    factors: Mapping[tuple[str, ...], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint's files, opened, and how their tensors relate to our parameters.

    `shards` holds the tensors of each file of a model-parallel set; a format without such shards has one.
    `entries(unstacked)` lists what the files must hold, for decoder layers held apart or stacked; `ignored`
    says of a name that it is known and not needed; `adapters` are to be added, in turn.
    """

    format: str
    path: Path
    config: SphinxConfig
    shards: list[Mapping[str, Tensor]]
    entries: Callable[[bool], list[ParamMapping]]
    ignored: Callable[[str], bool] = lambda name: False
    files: tuple[MappedFile, ...] = ()
    adapters: tuple[Adapters, ...] = ()

    @property
    def dtype(self) -> str:
        """Number format of the weights as stored, read off the first tensor of the decoder."""
        return next(tensor.dtype.name for entry in self.entries(True) if (tensor := self.shards[0].get(entry.name)))

    @property
    def tokenizer_bytes(self) -> bytes | None:
        """The SentencePiece file beside the weights, None if there is none."""
        file = self.path / "tokenizer.model"
        return file.read_bytes() if file.is_file() else None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of an entry's `view`: its first corner, and the tensor that holds it."""

    start: tuple[int, ...]
    tensor: Tensor


def match(opened: CheckpointSource, unstacked: bool) -> list[tuple[ParamMapping, list[Piece]]]:
    """Every entry with the pieces of files that make it up.

    Raises one UserError that lists all that is missing, unexpected, mis-shaped or not of one checkpoint.
    No weight is read but the small ones that tell shards of different checkpoints apart.
    """
    entries = opened.entries(unstacked)
    problems: list[str] = []
    matched = [(entry, _pieces(entry, opened.shards, problems)) for entry in entries]
    expected = {entry.name for entry in entries}
    extra = {name for shard in opened.shards for name in shard if name not in expected and not opened.ignored(name)}
    problems += [f"{name} is unexpected" for name in sorted(extra)]
    if not problems and len(opened.shards) > 1:
        problems = _strangers(entries, opened.shards)
    if problems:
        raise UserError(
            f"{opened.path} does not hold the model that its config describes ({len(problems)} problems): "
            + "; ".join(_grouped(problems))
        )
    return matched


def _grouped(problems: list[str]) -> list[str]:
    """The problems themselves, or if they are many, those that differ only in the number of a layer as one."""
    if len(problems) <= _FEW_PROBLEMS:
        return problems
    counts = Counter(re.sub(r"\.\d+\.", ".*.", problem) for problem in problems)
    return [like if count == 1 else f"{like} ({count} times)" for like, count in counts.items()]


def _pieces(entry: ParamMapping, shards: list[Mapping[str, Tensor]], problems: list[str]) -> list[Piece]:
    """The pieces of one entry; what is wrong with them is added to `problems`."""
    count = len(shards)
    try:
        holders = [entry.owner(count)] if entry.member else range(count)
        view, shape = entry.shard_view(count), entry.shard_shape(count)
    except ValueError as error:
        problems.append(f"{entry.name}: {error}")
        return []
    pieces = []
    for shard in holders:
        where = f"{entry.name} of shard {shard}" if count > 1 else entry.name
        tensor = shards[shard].get(entry.name)
        if tensor is None:
            problems.append(f"{where} is missing")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{where} has shape {tuple(tensor.shape)}, not {shape}")
        elif tensor.dtype.kind != "f" and tensor.dtype.name != "bfloat16":
            problems.append(f"{where} holds {tensor.dtype}, not floating-point numbers")
        elif entry.split is not None or not pieces:
            start = [0] * len(view)
            if entry.split is not None:
                start[entry.split] = shard * view[entry.split]
            pieces.append(Piece(tuple(start), tensor if shape == view else tensor.reshape(view)))
    return pieces


def _strangers(entries: list[ParamMapping], shards: list[Mapping[str, Tensor]]) -> list[str]:
    """Norms and routers that differ between shards, which hold them whole: they are of different checkpoints."""
    found = []
    for entry in entries:
        # Encoders are no help: they are frozen in training, and there are thousands of tensors.
        if entry.split is None and entry.member is None and entry.path[0] == "language":
            first = np.asarray(shards[0][entry.name]).tobytes()
            for i, shard in enumerate(shards[1:], 1):
                if first != np.asarray(shard[entry.name]).tobytes():
                    found.append(f"{entry.name} differs between shards 0 and {i}, which are of different checkpoints")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if there is none."""
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(values).__name__}")
    return values
