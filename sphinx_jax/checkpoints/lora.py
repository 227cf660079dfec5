"""Adapters on disk: DIR/lora.json names their base checkpoint, DIR/adapters holds them, written by Orbax.

Such a directory opens like any other checkpoint: the base is read, and scale x a b is merged into each adapted
matrix on load. Adapters fit one base only, so lora.json has a fingerprint of the base that they were trained on.
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
from jax.sharding import Sharding

from sphinx_jax.checkpoints.assets import has_tokenizer, read_assets
from sphinx_jax.checkpoints.loaded_model import abstract_adapters
from sphinx_jax.checkpoints.source import Adapters, CheckpointSource, read_json
from sphinx_jax.checkpoints.writer import write_json
from sphinx_jax.config import LoraConfig, LoraTargets, SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import GROUP_SIZE, QuantizedDtype
from sphinx_jax.lora_params import SUFFIX, Params

_FORMAT, _VERSION = "sphinx-jax-lora", 1
_INFO_FILE = "lora.json"

_FINGERPRINT_ELEMENTS = 1 << 16
"""Largest tensor that enters the fingerprint, in elements: norms, biases, routers. Training changes some of them."""


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """The content of lora.json."""

    base: Path
    fingerprint: str
    lora: LoraConfig
    quantize: QuantizedDtype | None = None
    """What the base was quantized to in training."""


def write_adapter_info(
    directory: Path, base: CheckpointSource, lora: LoraConfig, quantize: QuantizedDtype | None = None
) -> None:
    """Write DIRECTORY/lora.json: adapters of the sizes of `lora`, trained on `base`, which was quantized to `quantize`
    (None: not).
    """
    info = {"format": _FORMAT, "version": _VERSION, "base": str(base.path), "fingerprint": fingerprint(base)}
    write_json(directory / _INFO_FILE, info | dataclasses.asdict(lora) | {"quantize": quantize})


def is_lora(path: Path) -> bool:
    """Whether a directory holds adapters, or is a LoRA run that has not ended."""
    return (path / _INFO_FILE).is_file()


def read_adapter_info(path: Path) -> AdapterInfo:
    """Inverse of `write_adapter_info`. Raises UserError if the file is damaged."""
    values = read_json(path / _INFO_FILE)
    if (values.get("format"), values.get("version")) != (_FORMAT, _VERSION):
        raise UserError(f"{path / _INFO_FILE} does not describe adapters that this program reads; update it")
    try:
        targets = str(values["target_modules"])
        if targets not in get_args(LoraTargets):
            raise ValueError(f"unknown target_modules {targets}")
        lora = LoraConfig(int(values["rank"]), float(values["alpha"]), targets)  # pyright: ignore[reportArgumentType]
        quantize = values["quantize"]
        if quantize not in (None, *GROUP_SIZE):
            raise ValueError(f"unknown quantize {quantize}")
        return AdapterInfo(Path(values["base"]), str(values["fingerprint"]), lora, quantize)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / _INFO_FILE} is damaged, restore it from a copy: {error}") from error


def open_directory(
    path: Path, open_base: Callable[[Path], CheckpointSource], train_state: Path | None = None
) -> CheckpointSource:
    """The base checkpoint of the adapters in `path`, with the adapters.

    `train_state` is a training checkpoint to read the adapters from instead. Raises UserError if the base is missing
    or has changed, or the run has not ended and there is no `train_state`.
    """
    info = read_adapter_info(path)
    if not info.base.is_dir():
        raise UserError(
            f"{path} holds adapters of {info.base}, which does not exist; restore that checkpoint, or write its "
            f"new path into {path / _INFO_FILE}"
        )
    base = open_base(info.base)
    if base.quantized:
        raise UserError(
            f"{path} holds adapters of {info.base}, which is quantized: adapters are merged into an unquantized "
            f"base; write its path into {path / _INFO_FILE}"
        )
    if fingerprint(base) != info.fingerprint:
        raise UserError(f"{path} holds adapters of {info.base}, which has changed since; restore the old one")
    # A run has the tokenizer that it was trained with; adapters alone have the base's.
    own_tokenizer = has_tokenizer(read_assets(path))
    with_tokenizer = None if own_tokenizer else base.asset_directory or base.path
    adapters = (*base.adapters, read_run(path, base.config, train_state))
    return dataclasses.replace(base, path=path, asset_directory=with_tokenizer, adapters=adapters)


def read_run(path: Path, config: SphinxConfig, train_state: Path | None = None) -> Adapters:
    """The adapters alone of a run on a model of this config; those of a training checkpoint with `train_state`.

    Raises UserError if the run has not ended and there is no `train_state`, or if they are of a model of other sizes.
    """
    if train_state is None and not (path / "adapters").is_dir():
        raise UserError(
            f"{path} is a run that has not ended; continue it with --resume, or convert one of its checkpoints with "
            "sphinx-jax convert RUN DIR --step N"
        )
    subtree = () if train_state is None else ("params", "adapters")
    lora = read_adapter_info(path).lora
    return Adapters(lora.scale, _read_factors(train_state or path / "adapters", subtree, config, lora))


def save(path: Path, adapters: Params) -> None:
    """Write a run's adapters next to its lora.json. Every process of a multi-process run calls this."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute() / "adapters", args=ocp.args.PyTreeSave(adapters), force=True)


def fingerprint(source: CheckpointSource) -> str:
    """Hash of a checkpoint's small tensors and of its own adapters."""
    digest = hashlib.sha256()
    for mapping in source.mappings(True):
        tensor = source.shards[0].get(mapping.name)
        if tensor is not None and math.prod(tensor.shape) <= _FINGERPRINT_ELEMENTS:
            digest.update(np.ascontiguousarray(tensor[(slice(None),) * len(tensor.shape)]).tobytes())
    for adapters in source.adapters:
        for path in sorted(adapters.factors):
            for factor in adapters.factors[path]:
                digest.update(factor.tobytes())
    return digest.hexdigest()[:16]


def _read_factors(
    directory: Path, subtree: tuple[str, ...], config: SphinxConfig, lora: LoraConfig
) -> dict[tuple, Any]:
    """(a, b) of each adapted matrix by its path, layers stacked, in host memory."""
    abstract = abstract_adapters(config, lora)
    target: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract)
    for key in reversed(subtree):
        target = {key: target}
    to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            request = ocp.args.PyTreeRestore(target, restore_args=to_host, partial_restore=True)
            tree = checkpointer.restore(directory.absolute(), args=request)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is damaged, restore it from a copy: {str(error).splitlines()[0]}") from error
    for key in subtree:
        tree = tree[key]
    if [leaf.shape for leaf in jax.tree.leaves(tree)] != [leaf.shape for leaf in jax.tree.leaves(abstract)]:
        raise UserError(
            f"{directory} does not hold the adapters of rank {lora.rank} on {lora.target_modules} that {_INFO_FILE} "
            "describes; restore it from a copy"
        )
    factors: dict[tuple, dict[str, np.ndarray]] = {}
    leaves: list[tuple[Any, Any]] = jax.tree_util.tree_leaves_with_path(tree)
    for keys, leaf in leaves:
        *path, module, factor = (key.key for key in keys)
        factors.setdefault((*path, module.removesuffix(SUFFIX)), {})[factor] = leaf
    return {path: (pair["a"], pair["b"]) for path, pair in factors.items()}


def merge_adapter(weight: jax.Array, path: tuple[str | int, ...], adapters: Adapters) -> jax.Array:
    """A parameter with its adapter merged, same sharding; the parameter itself if it has none. Donates `weight`."""
    layer = next((key for key in path if isinstance(key, int)), None)
    factors = adapters.factors.get(tuple(key for key in path if not isinstance(key, int)))
    if factors is None:
        return weight
    a, b = factors if layer is None else (factor[layer] for factor in factors)
    return _compile_merge(weight.sharding, adapters.scale, layer is None)(weight, a, b)


@functools.cache
def _compile_merge(sharding: Sharding, scale: float, stacked: bool) -> Callable[..., jax.Array]:
    """weight + scale a b in float32; stacked layers one at a time, to bound the float32 temporaries."""

    def merge(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = args
        # weight[*stack, *in, *out], a[*stack, *in, rank], b[*stack, rank, *out]
        stack = a.ndim + b.ndim - 2 - weight.ndim
        dims = list(range(weight.ndim))
        rank, num_in = weight.ndim, a.ndim - 1
        product = jnp.einsum(
            a,
            [*dims[:num_in], rank],
            b,
            [*dims[:stack], rank, *dims[num_in:]],
            dims,
            precision=jax.lax.Precision.HIGHEST,
        )
        return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)

    def merge_one(*args: jax.Array) -> jax.Array:
        return merge((args[0], args[1], args[2]))

    def merge_layers(*args: jax.Array) -> jax.Array:
        return jax.lax.map(merge, args)

    return jax.jit(merge_layers if stacked else merge_one, donate_argnums=0, out_shardings=sharding)
