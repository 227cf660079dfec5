"""Convert and inspect checkpoints of any format."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.cli import common

EXAMPLES = """examples:
  python -m sphinx_jax.checkpoints inspect SPHINX-MoE
  python -m sphinx_jax.checkpoints convert SPHINX-MoE sphinx-native --format native
  python -m sphinx_jax.checkpoints convert runs/mine out --format accessory --shards 8 --dtype bfloat16
  python -m sphinx_jax.checkpoints convert runs/mine out --format mixtral
      the language part alone, as transformers reads it
"""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a checkpoint in another format."""

    source: tyro.conf.Positional[Path]
    """Directory to read, of any known format."""
    destination: tyro.conf.Positional[Path]
    """Directory to write; it must not exist, or be empty."""
    format: Literal["native", "accessory", "mixtral"]
    """What to write; mixtral is Hugging Face's layout of the language part."""
    shards: int | None = None
    """Number of files: of accessory 1 by default, of mixtral as many as make 5 GB each."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the numbers written; as stored by default."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Say what a checkpoint holds, without reading its weights."""

    path: tyro.conf.Positional[Path]
    """Directory of any known format."""


Command = Annotated[Convert, tyro.conf.subcommand("convert")] | Annotated[Inspect, tyro.conf.subcommand("inspect")]


def main(argv: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    command = common.parse(Command, argv, "python -m sphinx_jax.checkpoints", f"{__doc__}\n\n{EXAMPLES}")
    if isinstance(command, Convert):
        checkpoints.convert(command.source, command.destination, command.format, command.shards, command.dtype)
        print(f"wrote {command.destination}")
    else:
        print("\n".join(describe(checkpoints.open(command.path))))
    return 0


def describe(opened: checkpoints.CheckpointSource) -> list[str]:
    """Lines on the format, the config, the parameters by part of the model, and the tensors."""
    entries = opened.entries(True)
    parts: Counter[str] = Counter()
    for entry in entries:
        parts[_part(entry)] += math.prod(entry.shape)
    tensors = [(name, tensor) for shard in opened.shards for name, tensor in shard.items()]
    dtypes = Counter(tensor.dtype.name for _, tensor in tensors)
    shards = len(opened.shards)
    lines = [
        f"{opened.path}",
        f"format      {opened.format}" + (f", {shards} shards" if shards > 1 else ""),
        f"dtype       {', '.join(f'{name} ({count} tensors)' for name, count in dtypes.most_common())}",
        f"tokenizer   {'tokenizer.model' if opened.tokenizer_bytes else 'none'}",
        f"language    {opened.config.language}",
        f"vision      {opened.config.vision}",
        "",
        f"parameters  {sum(parts.values()):,}",
        *(f"  {count:>16,}  {part}" for part, count in parts.items()),
        "",
        f"tensors     {len(tensors):,}" + (", of shard 0:" if shards > 1 else ""),
    ]
    used = {entry.name for entry in entries}
    shapes: dict[tuple[str, tuple[int, ...], str, bool], int] = {}
    for name, tensor in opened.shards[0].items():
        like = (re.sub(r"\b\d+\b", "*", name), tuple(tensor.shape), tensor.dtype.name, name in used)
        shapes[like] = shapes.get(like, 0) + 1
    for (name, shape, dtype, is_used), count in shapes.items():
        lines.append(f"  {count:>5} x {name}  {list(shape)}  {dtype}" + ("" if is_used else "  (not used)"))
    return lines


def _part(entry: ParamMapping) -> str:
    """The part of the model that a parameter belongs to: language.attention, vision.clip, ..."""
    names = [key for key in entry.path if isinstance(key, str) and key != "layers"]
    return ".".join(names[:2])
