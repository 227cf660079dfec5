"""Adapters on disk: DIR/lora.json names the base that they belong to, DIR/adapters holds them, written by Orbax.

Such a directory is opened like any other checkpoint: what is read is the base, and each matrix that has an adapter
gets scale x a b added when it is read. An adapter is worth nothing beside another base, so lora.json has a
fingerprint of the one that it was trained on.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from sphinx_jax.checkpoints.loaded_model import abstract_adapters
from sphinx_jax.checkpoints.source import Adapters, CheckpointSource, read_json
from sphinx_jax.checkpoints.writer import write_json
from sphinx_jax.config import LoraConfig, LoraTargets, SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.lora_params import SUFFIX, Params

_FORMAT, _VERSION = "sphinx-jax-lora", 1
_RECORD = "lora.json"

_FINGERPRINTED = 1 << 16
"""Most elements of a tensor that counts for the fingerprint: norms, biases, routers. No training leaves them all."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What lora.json says."""

    base: Path
    fingerprint: str
    lora: LoraConfig


def write_record(directory: Path, base: CheckpointSource, lora: LoraConfig) -> None:
    """Write DIRECTORY/lora.json: adapters of the sizes of `lora`, trained on `base`."""
    described = {"format": _FORMAT, "version": _VERSION, "base": str(base.path), "fingerprint": fingerprint(base)}
    write_json(directory / _RECORD, described | dataclasses.asdict(lora))


def is_lora(path: Path) -> bool:
    """Whether a directory holds adapters, or will at the end of the run that writes it."""
    return (path / _RECORD).is_file()


def read_record(path: Path) -> Record:
    """Inverse of `write_record`. Raises UserError where it is damaged."""
    values = read_json(path / _RECORD)
    if (values.get("format"), values.get("version")) != (_FORMAT, _VERSION):
        raise UserError(f"{path / _RECORD} does not describe adapters that this program reads; update it")
    try:
        lora = LoraConfig(int(values["rank"]), float(values["alpha"]), str(values["target_modules"]))
        if lora.target_modules not in get_args(LoraTargets):
            raise ValueError(f"unknown target_modules {lora.target_modules}")
        return Record(Path(values["base"]), str(values["fingerprint"]), lora)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / _RECORD} is damaged, restore it from a copy: {error}") from error


def open_directory(
    path: Path, open_base: Callable[[Path], CheckpointSource], state: Path | None = None
) -> CheckpointSource:
    """The base of the adapters in `path`, with them; `state` is a training checkpoint to take them from instead.

    Raises UserError if the base has gone or has changed, or the run has not ended and there is no `state`.
    """
    record = read_record(path)
    if not record.base.is_dir():
        raise UserError(
            f"{path} holds adapters of {record.base}, which is not there; put that checkpoint back, or write where it "
            f"is now into {path / _RECORD}"
        )
    base = open_base(record.base)
    if fingerprint(base) != record.fingerprint:
        raise UserError(f"{path} holds adapters of {record.base}, which has changed since: bring the old one back")
    if state is None and not (path / "adapters").is_dir():
        raise UserError(
            f"{path} is a run that has not ended: go on with --resume, or export one of its checkpoints with "
            "python -m sphinx_jax.training.export"
        )
    inside = () if state is None else ("params", "adapters")
    factors = _read(state or path / "adapters", inside, base.config, record.lora)
    return dataclasses.replace(base, path=path, adapters=(*base.adapters, Adapters(record.lora.scale, factors)))


def save(path: Path, adapters: Params) -> None:
    """Write a run's adapters beside its lora.json. Every process of a multi-process run calls this."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute() / "adapters", args=ocp.args.PyTreeSave(adapters), force=True)


def fingerprint(opened: CheckpointSource) -> str:
    """Of a checkpoint's small tensors, and of adapters that it has itself."""
    digest = hashlib.sha256()
    for entry in opened.entries(True):
        tensor = opened.shards[0].get(entry.name)
        if tensor is not None and math.prod(tensor.shape) <= _FINGERPRINTED:
            digest.update(np.ascontiguousarray(tensor[(slice(None),) * len(tensor.shape)]).tobytes())
    for adapters in opened.adapters:
        for path in sorted(adapters.factors):
            for factor in adapters.factors[path]:
                digest.update(factor.tobytes())
    return digest.hexdigest()[:16]


def _read(directory: Path, inside: tuple[str, ...], config: SphinxConfig, lora: LoraConfig) -> dict[tuple, Any]:
    """The factors of each adapted matrix, by its path with layers stacked, in host memory."""
    abstract = abstract_adapters(config, lora)
    target: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract)
    for key in reversed(inside):
        target = {key: target}
    to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            request = ocp.args.PyTreeRestore(target, restore_args=to_host, partial_restore=True)
            tree = checkpointer.restore(directory.absolute(), args=request)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is damaged, restore it from a copy: {str(error).splitlines()[0]}") from error
    for key in inside:
        tree = tree[key]
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    if shapes(tree) != shapes(abstract):
        raise UserError(
            f"{directory} does not hold the adapters of rank {lora.rank} on {lora.target_modules} that {_RECORD} says"
        )
    factors: dict[tuple, dict[str, np.ndarray]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *path, module, factor = (key.key for key in keys)
        factors.setdefault((*path, module.removesuffix(SUFFIX)), {})[factor] = leaf
    return {path: (pair["a"], pair["b"]) for path, pair in factors.items()}


def merged(weight: jax.Array, path: tuple[str | int, ...], adapters: Adapters) -> jax.Array:
    """A parameter with its adapter added, where it lies; itself if it has none. Takes its memory over."""
    layer = next((key for key in path if isinstance(key, int)), None)
    factors = adapters.factors.get(tuple(key for key in path if not isinstance(key, int)))
    if factors is None:
        return weight
    a, b = factors if layer is None else (factor[layer] for factor in factors)
    return _merger(weight.sharding, adapters.scale, layer is None)(weight, a, b)


@functools.cache
def _merger(sharding: NamedSharding, scale: float, stacked: bool) -> Callable[..., jax.Array]:
    """weight + scale a b in float32, of stacked layers one at a time."""

    def merge(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = args
        # weight[*stack, *in, *out], a[*stack, *in, rank], b[*stack, rank, *out]
        stack = a.ndim + b.ndim - 2 - weight.ndim
        dims = list(range(weight.ndim))
        rank, split = weight.ndim, a.ndim - 1
        product = jnp.einsum(
            a, [*dims[:split], rank], b, [*dims[:stack], rank, *dims[split:]], dims, precision=jax.lax.Precision.HIGHEST
        )
        return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)

    layers = lambda *args: jax.lax.map(merge, args)
    return jax.jit(layers if stacked else lambda *args: merge(args), donate_argnums=0, out_shardings=sharding)
