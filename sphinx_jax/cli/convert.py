"""Convert and inspect checkpoints of any format."""

import dataclasses
import math
import re
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.cli import common
from sphinx_jax.errors import UserError
from sphinx_jax.training.export import export_adapters, export_step, is_unfinished_run

EXAMPLES = """examples:
  sphinx-jax convert inspect SPHINX-MoE
  sphinx-jax convert SPHINX-MoE sphinx-native
  sphinx-jax convert SPHINX-MoE sphinx-int4 --quantize int4
      weight-only quantized: infer, serve and evaluate load it without reading the original
  sphinx-jax convert runs/mine out --format accessory --shards 8 --dtype bfloat16
  sphinx-jax convert runs/mine out --format mixtral
      the language part alone, as transformers reads it
  sphinx-jax convert runs/mine best --step 800
      one checkpoint of a run, finished or not
  sphinx-jax convert runs/mine-lora adapters --format peft
      the adapters of a LoRA run, as peft reads them

python -m sphinx_jax.checkpoints is the same command.
"""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a checkpoint, or one of a run's checkpoints, in another format."""

    source: tyro.conf.Positional[Path]
    """Directory to read: a checkpoint of any known format, or a run of train.py."""
    destination: tyro.conf.Positional[Path]
    """Directory to write; it must not exist, or be empty."""
    format: Literal["native", "accessory", "mixtral", "peft"] = "native"
    """Format to write; mixtral is Hugging Face's layout of the language part, peft the adapters alone of a LoRA run."""
    step: int | None = None
    """Checkpoint of a run to read; by default the final weights, or the newest checkpoint of an unfinished run."""
    shards: int | None = None
    """Number of files: 1 by default for accessory, files of 5 GB each for mixtral."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of the weights written; as stored by default."""
    quantize: Literal["int8", "int4"] | None = None
    """Weight-only quantization of the decoder's matrices, for inference; native format only."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Print what a checkpoint holds, without reading its weights."""

    path: tyro.conf.Positional[Path]
    """Directory of any known format."""


Command: Any = Annotated[Convert, tyro.conf.subcommand("convert")] | Annotated[Inspect, tyro.conf.subcommand("inspect")]


def main(argv: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    # `sphinx-jax convert SOURCE DESTINATION` needs no second "convert".
    if argv and argv[0] not in ("convert", "inspect", "--help", "-h"):
        argv = ["convert", *argv]
    command = common.parse(Command, argv, "python -m sphinx_jax.checkpoints", f"{__doc__}\n\n{EXAMPLES}")
    if isinstance(command, Inspect):
        print("\n".join(describe(checkpoints.open(command.path))))
        return 0
    source, destination = command.source, command.destination
    # SIGTERM as Ctrl-C: a destination that is half written is removed.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if command.format == "peft":
            write_peft(command)
        elif command.step is not None or is_unfinished_run(source):
            if command.quantize:
                raise UserError("--quantize takes a whole model: convert the run's step first, and then the result")
            step = export_step(source, destination, command.step, command.format, command.shards, command.dtype)
            print(f"wrote the weights of step {step} to {destination}")
        else:
            checkpoints.convert(source, destination, command.format, command.shards, command.dtype, command.quantize)
            print(f"wrote {destination}")
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def write_peft(command: Convert) -> None:
    """Write the adapters of a LoRA run and print the base they need. Raises UserError."""
    if command.shards is not None or command.quantize:
        raise UserError("--shards and --quantize do not go with --format peft: leave them out")
    base = export_adapters(command.source, command.destination, command.step, command.dtype)
    print(f"wrote {command.destination}: adapters of {base}, which transformers reads in the format mixtral")


def describe(source: checkpoints.CheckpointSource) -> list[str]:
    """Lines on the format, the config, the parameters by part of the model, and the tensors."""
    mappings = source.mappings(True)
    parts: Counter[str] = Counter()
    for mapping in mappings:
        parts[_model_part(mapping)] += _num_weights(mapping)
    tensors = [(name, tensor) for shard in source.shards for name, tensor in shard.items()]
    dtypes = Counter(tensor.dtype.name for _, tensor in tensors)
    shards = len(source.shards)
    lines = [
        f"{source.path}",
        f"format      {source.format}" + (f", {shards} shards" if shards > 1 else ""),
        *([f"quantized   {source.quantized}"] if source.quantized else []),
        f"dtype       {', '.join(f'{name} ({count} tensors)' for name, count in dtypes.most_common())}",
        f"tokenizer   {tokenizer_name(source)}",
        f"language    {source.config.language}",
        f"vision      {source.config.vision}",
        "",
        f"parameters  {sum(parts.values()):,}",
        *(f"  {count:>16,}  {part}" for part, count in parts.items()),
        "",
        f"tensors     {len(tensors):,}" + (", of shard 0:" if shards > 1 else ""),
    ]
    mapped_names = {mapping.name for mapping in mappings}
    counts: Counter[tuple[str, tuple[int, ...], str, bool]] = Counter()
    for name, tensor in source.shards[0].items():
        pattern = re.sub(r"\b\d+\b", "*", name)
        counts[pattern, tuple(tensor.shape), tensor.dtype.name, name in mapped_names] += 1
    for (name, shape, dtype, is_used), count in counts.items():
        lines.append(f"  {count:>5} x {name}  {list(shape)}  {dtype}" + ("" if is_used else "  (not used)"))
    return lines


def tokenizer_name(source: checkpoints.CheckpointSource) -> str:
    """The file of the checkpoint's tokenizer."""
    return next((name for name in ("tokenizer.model", "tokenizer.json") if name in source.assets), "none")


def _num_weights(mapping: ParamMapping) -> int:
    """Weights of the model in a tensor: two in a byte of int4, and none in the scales."""
    if mapping.dtype is None:
        return math.prod(mapping.shape)
    return math.prod(mapping.shape) * {"int8": 1, "uint8": 2}[mapping.dtype] if mapping.path[-1] == "values" else 0


def _model_part(mapping: ParamMapping) -> str:
    """The part of the model that a parameter belongs to: language.attention, vision.clip, ..."""
    names = [key for key in mapping.path if isinstance(key, str) and key != "layers"]
    return ".".join(names[:2])
