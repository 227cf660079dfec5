"""An opened checkpoint of any format: its config, its tensors by name, and their mappings to parameters."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sphinx_jax.checkpoints.assets import read_assets
from sphinx_jax.checkpoints.io.mapped_file import MappedFile
from sphinx_jax.checkpoints.io.names import shorten
from sphinx_jax.checkpoints.io.placeholders import check_real_file
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.config import LoraConfig, SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import QuantizedDtype

_MAX_LISTED_PROBLEMS = 30
_MAX_JSON_BYTES = 1 << 26


@runtime_checkable
class Tensor(Protocol):
    """A stored tensor: a numpy view of a mapped file, or an object that reads when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank adapters, merged into a checkpoint's matrices on load: W + scale x a b.

    `factors` maps the path of a matrix to (a, b), layers stacked (see `layers.LowRank`).
    """

    scale: float
    factors: Mapping[tuple[str, ...], tuple[np.ndarray, np.ndarray]]


def lora_config(adapters: Adapters) -> LoraConfig:
    """The sizes that hold every factor of a set of adapters, with the same scale."""
    rank = max(a.shape[-1] for a, _ in adapters.factors.values())
    adapts_experts = any("ffn" in path for path in adapters.factors)
    return LoraConfig(rank, adapters.scale * rank, "all" if adapts_experts else "attention")


def ignore_none(name: str) -> bool:
    """No tensor of the checkpoint may be left unused."""
    return False


@dataclasses.dataclass(frozen=True)
class CheckpointSource:
    """The open files of a checkpoint and the mappings from their tensors to parameters.

    `shards` holds the tensors of each file of a model-parallel set; a format without such shards has one.
    `mappings(unstacked)` lists the tensors that the files must hold, for unstacked or stacked decoder layers.
    `is_ignored(name)` is true of a known tensor that no parameter needs. `adapters` are merged on load, in order.
    """

    format: str
    path: Path
    config: SphinxConfig
    shards: list[Mapping[str, Tensor]]
    mappings: Callable[[bool], list[ParamMapping]]
    is_ignored: Callable[[str], bool] = ignore_none
    files: tuple[MappedFile, ...] = ()
    adapters: tuple[Adapters, ...] = ()
    expected_tokens: int | None = None
    """Tokens of the tokenizer that goes with the model; None for models that this program wrote."""
    asset_directory: Path | None = None
    """Where tokenizer and generation config are, if not in `path`."""
    quantized: QuantizedDtype | None = None
    """Of the decoder's matrices, if they are stored quantized."""

    @property
    def dtype(self) -> str:
        """Dtype of the stored weights: that of the first decoder tensor that is not quantized."""
        return next(
            tensor.dtype.name
            for mapping in self.mappings(True)
            if mapping.dtype is None and (tensor := self.shards[0].get(mapping.name)) is not None
        )

    @property
    def tokenizer_bytes(self) -> bytes | None:
        """The SentencePiece file, None if there is no tokenizer. Raises UserError if there is another kind alone."""
        assets = self.assets
        if "tokenizer.model" not in assets and "tokenizer.json" in assets:
            raise UserError(
                f"{self.path} has tokenizer.json alone, and this needs tokenizer.model: copy the model's own"
            )
        return assets.get("tokenizer.model")

    @property
    def assets(self) -> dict[str, bytes]:
        """Tokenizer, generation config and chat template by file name. Raises UserError if one cannot be read."""
        return read_assets(self.asset_directory or self.path)


@dataclasses.dataclass(frozen=True)
class FileSlice:
    """The box of a mapping's `view` that one file holds: the box's first index, and the tensor."""

    start: tuple[int, ...]
    tensor: Tensor


MatchedMappings = list[tuple[ParamMapping, list[FileSlice]]]
"""Each mapping with the file slices that it is read from."""


def match(source: CheckpointSource, unstacked: bool) -> MatchedMappings:
    """Every mapping with its file slices.

    Raises one UserError that lists every tensor that is missing, unexpected, mis-shaped or of another checkpoint, and
    UserError for stacked layers, which training needs, of a quantized checkpoint.
    Reads no weights except the replicated norms and routers, which distinguish shards of different checkpoints.
    """
    if source.quantized and not unstacked:
        raise UserError(
            f"{source.path} is quantized to {source.quantized} and cannot be trained; give the checkpoint that it was "
            "converted from"
        )
    mappings = source.mappings(unstacked)
    problems: list[str] = []
    matched = [(mapping, _file_slices(mapping, source.shards, problems)) for mapping in mappings]
    expected = {mapping.name for mapping in mappings}
    extra = {name for shard in source.shards for name in shard if name not in expected and not source.is_ignored(name)}
    problems += [f"{shorten(name)} is unexpected" for name in sorted(extra)]
    if not problems and len(source.shards) > 1:
        problems = _shard_mismatches(mappings, source.shards)
    if problems:
        raise UserError(
            f"{source.path} does not hold the model that its config describes ({len(problems)} problems): "
            + "; ".join(_summarise(problems))
        )
    return matched


def _summarise(problems: list[str]) -> list[str]:
    """The problems; beyond `_MAX_LISTED_PROBLEMS`, those that differ only in the layer index are counted as one."""
    if len(problems) <= _MAX_LISTED_PROBLEMS:
        return problems
    counts = Counter(re.sub(r"\.\d+\.", ".*.", problem) for problem in problems)
    summary = [pattern if count == 1 else f"{pattern} ({count} times)" for pattern, count in counts.items()]
    more = len(summary) - 2 * _MAX_LISTED_PROBLEMS
    return summary if more <= 0 else [*summary[: 2 * _MAX_LISTED_PROBLEMS], f"and {more} more"]


def _file_slices(mapping: ParamMapping, shards: list[Mapping[str, Tensor]], problems: list[str]) -> list[FileSlice]:
    """The file slices of one mapping; appends each problem to `problems`."""
    count = len(shards)
    try:
        shard_indices = [mapping.expert_shard(count)] if mapping.expert else range(count)
        view, shape = mapping.shard_view(count), mapping.shard_shape(count)
    except ValueError as error:
        problems.append(f"{mapping.name}: {error}")
        return []
    slices: list[FileSlice] = []
    for shard in shard_indices:
        label = f"{mapping.name} of shard {shard}" if count > 1 else mapping.name
        tensor: Any = shards[shard].get(mapping.name)
        if tensor is None:
            problems.append(f"{label} is missing")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{label} has shape {tuple(tensor.shape)}, not {shape}")
        elif mapping.dtype not in (None, tensor.dtype.name):
            problems.append(f"{label} holds {tensor.dtype}, not {mapping.dtype}")
        elif mapping.dtype is None and tensor.dtype.kind != "f" and tensor.dtype.name != "bfloat16":
            problems.append(f"{label} holds {tensor.dtype}, not floating-point numbers")
        elif mapping.shard_dim is not None or not slices:
            start = [0] * len(view)
            if mapping.shard_dim is not None:
                start[mapping.shard_dim] = shard * view[mapping.shard_dim]
            slices.append(FileSlice(tuple(start), tensor if shape == view else tensor.reshape(view)))
    return slices


def _shard_mismatches(mappings: list[ParamMapping], shards: list[Mapping[str, Tensor]]) -> list[str]:
    """Replicated norms and routers that differ between shards: those shards are of different checkpoints."""
    problems = []
    for mapping in mappings:
        # Encoders are skipped: they are frozen in training, and they have thousands of tensors.
        if mapping.shard_dim is None and mapping.expert is None and mapping.path[0] == "language":
            first = np.asarray(shards[0][mapping.name]).tobytes()
            for i, shard in enumerate(shards[1:], 1):
                if first != np.asarray(shard[mapping.name]).tobytes():
                    problems.append(
                        f"{mapping.name} differs between shards 0 and {i}, which are of different checkpoints"
                    )
    return problems


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if there is none."""
    try:
        if not file.is_file() and file.exists():
            raise UserError(f"cannot read {file}: it is not a regular file; put the checkpoint's own file there")
        if file.is_file() and file.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{file} is too large for a config or an index; download it again")
        data = file.read_bytes()
        check_real_file(file, data[:1024])
        values = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; download it again, or make it readable") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(values).__name__}")
    return values
