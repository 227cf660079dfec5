"""Our own checkpoints: DIR/config.json, DIR/tokenizer.model and DIR/params, the weights written by Orbax.

`params` is a key-value store of TensorStore's (OCDBT) in which each parameter is a Zarr array, named by its
path joined with dots. The layers of the decoder are stored as the writer held them, stacked or apart, and are
read as the reader asks.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Mesh

from sharding import is_primary_process, make_mesh
from sphinx_jax.checkpoints import reader
from sphinx_jax.checkpoints.formats.config_files import check_decoder, check_types, check_vision
from sphinx_jax.checkpoints.loaded_model import Loaded, Params, abstract_model, layers_are_unstacked
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.checkpoints.source import CheckpointSource, Tensor, read_json
from sphinx_jax.checkpoints.writer import new_directory, write_json
from sphinx_jax.config import SphinxConfig
from sphinx_jax.errors import UserError

_FORMAT, _VERSION = "sphinx-jax", 1
_LAYERS = ("language", "layers")

# Small enough that a device's slice does not drag in much of its neighbours', large enough for a disk.
_CHUNK_BYTES = 1 << 27


def save(
    path: str | os.PathLike, config: SphinxConfig, params: Params, tokenizer_bytes: bytes, overwrite: bool = False
) -> None:
    """Write a native checkpoint. Every process of a multi-process run calls this.

    The directory appears under its name only when it is complete. Raises UserError if it exists already,
    unless `overwrite` is set.
    """
    stacked = not layers_are_unstacked(params)

    def options(keys: tuple[jax.tree_util.DictKey, ...], _: Any) -> ocp.SaveArgs:
        # One chunk a layer at most, so that a layer can be read out of a stack without reading the stack.
        in_stack = stacked and tuple(key.key for key in keys[:2]) == _LAYERS
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if in_stack else ())

    with new_directory(Path(path).absolute(), overwrite) as partial:
        if is_primary_process():
            described = {"format": _FORMAT, "version": _VERSION, "model": config.to_dict(), "stacked": stacked}
            write_json(partial / "config.json", described)
            (partial / "tokenizer.model").write_bytes(tokenizer_bytes)
        save_args = jax.tree_util.tree_map_with_path(options, params)
        # Weights hardly shrink, and packing them takes longer than writing them.
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial / "params", args=ocp.args.PyTreeSave(params, save_args=save_args))


def is_native(path: Path) -> bool:
    """Whether a directory holds a native checkpoint, whole or damaged."""
    if (path / "params").is_dir():
        return True
    try:
        return read_json(path / "config.json").get("format") == _FORMAT
    except UserError:
        return False


def load(path: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None, unstacked: bool = True) -> Loaded:
    """A native checkpoint on `mesh` (None: all devices), whatever mesh wrote it.

    `dtype` is "bfloat16", "float32", or None for as stored. `unstacked` holds the decoder's layers as a list.
    Raises UserError that names what is missing or damaged.
    """
    return reader.load(open_directory(Path(path).absolute()), mesh, dtype, unstacked)


def open_directory(path: Path) -> CheckpointSource:
    """The directory's config, and its parameters, opened. Raises UserError; no weight is read."""
    config, stacked = _read_config(path)
    for name in ("tokenizer.model", "params"):
        if not (path / name).exists():
            raise UserError(f"{path} is damaged: {name} is missing; copy the whole directory again")
    return CheckpointSource(
        format="native",
        path=path,
        config=config,
        shards=[_stored_tensors(path, config, stacked)],
        entries=lambda unstacked: _entries(config, unstacked),
    )


def _read_config(path: Path) -> tuple[SphinxConfig, bool]:
    """The model's config, and whether its layers are stored stacked. Raises UserError."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a sphinx-jax checkpoint: it has no config.json")
    described = read_json(file)
    if described.get("format") != _FORMAT:
        raise UserError(f'{file} does not describe a sphinx-jax checkpoint: it lacks "format": "{_FORMAT}"')
    if described.get("version") != _VERSION:
        raise UserError(
            f"{file} has version {described.get('version')!r} and this program reads version {_VERSION}; update it"
        )
    if not isinstance(described.get("stacked"), bool):
        raise UserError(f'{file} lacks "stacked": true or false')
    try:
        config = SphinxConfig.from_dict(described.get("model"))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    check_types(file, "model", config)
    check_decoder(file, config.language)
    if config.vision:
        check_vision(file, config.vision)
    return config, described["stacked"]


def _entries(config: SphinxConfig, unstacked: bool) -> list[ParamMapping]:
    """Each of our parameters from the stored one of its name; a stack from the parameters of its layers."""
    _, abstract = abstract_model(config, make_mesh(), None, unstacked)
    entries = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        path = tuple(key.key for key in keys)
        if path[:2] == _LAYERS and not unstacked:
            shape = leaf.shape[1:]
            names = [(_name((*path[:2], i, *path[2:])), (i,)) for i in range(leaf.shape[0])]
        else:
            shape, names = leaf.shape, [(_name(path), ())]
        entries += [ParamMapping(name, shape, path, index, shape, tuple(range(len(shape)))) for name, index in names]
    return entries


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


class _Stored:
    """A stored array, or one layer of it; indexing reads. Raises UserError where its data is damaged."""

    def __init__(self, where: str, array: tensorstore.TensorStore):
        self.shape = tuple(array.shape)
        self.dtype = array.dtype.numpy_dtype
        self._where = where
        self._array = array

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return self._array[index].read().result()
        except (ValueError, OSError) as error:
            raise _damaged(self._where, error) from error


def _stored_tensors(path: Path, config: SphinxConfig, stacked: bool) -> dict[str, Tensor]:
    """The stored parameters by name. Stacked layers appear as if they had been stored apart."""
    tensors: dict[str, Tensor] = {}
    prefix = _name(_LAYERS) + "."
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/params/"}}
    try:
        keys = tensorstore.KvStore.open(store).result().list().result()
    except (ValueError, OSError) as error:
        raise _damaged(f"{path}/params", error) from error
    if not keys:
        raise UserError(f"{path}/params is damaged, copy the whole checkpoint again: it holds no arrays")
    for name in sorted(key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")):
        # Data that is gone would otherwise read as zeros.
        spec = {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}, "fill_missing_data_reads": False}
        where = f"{name} in {path}/params"
        try:
            array = tensorstore.open(spec, read=True, open=True).result()
        except (ValueError, OSError) as error:
            raise _damaged(where, error) from error
        if stacked and name.startswith(prefix):
            for i in range(array.shape[0]):
                tensors[f"{prefix}{i}.{name.removeprefix(prefix)}"] = _Stored(where, array[i])
        else:
            tensors[name] = _Stored(where, array)
    return tensors


def _damaged(where: str, error: Exception) -> UserError:
    reason = str(error).split(" [", 1)[0]
    return UserError(f"{where} is damaged, copy the whole checkpoint again: {reason}")
