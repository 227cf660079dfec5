"""Our own checkpoints: DIR/config.json, DIR/tokenizer.model and DIR/params, the weights written by Orbax.

`params` is a TensorStore key-value store (OCDBT) in which each parameter is a Zarr array, named by its path
joined with dots. The decoder's layers are stored stacked or unstacked, as the writer had them, and are loaded
either way. Of a quantized parameter each array is stored, under the parameter's name and its own; config.json says
what they are quantized to, and the layers are unstacked.
"""

import functools
import gc
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import is_primary_process, make_mesh
from sphinx_jax.checkpoints import reader
from sphinx_jax.checkpoints.assets import Assets, as_assets, write_assets
from sphinx_jax.checkpoints.formats.config_files import check_decoder, check_types, check_vision
from sphinx_jax.checkpoints.loaded_model import Loaded, Params, abstract_model, layers_are_unstacked
from sphinx_jax.checkpoints.mapping.language import EMBEDDING, HEAD, unpadded_shape, vocab_index
from sphinx_jax.checkpoints.mapping.param_mapping import Index, ParamMapping
from sphinx_jax.checkpoints.source import CheckpointSource, Tensor, read_json
from sphinx_jax.checkpoints.writer import ParamReader, new_directory, write_json
from sphinx_jax.config import SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import GROUP_SIZE, Quantized, QuantizedDtype
from sphinx_jax.quantization import quantized as to_quantized
from sphinx_jax.quantization import quantized_dtype

_FORMAT, _VERSION, _QUANTIZED_VERSION = "sphinx-jax", 1, 5
_OLD_QUANTIZED_VERSIONS = (2, 3, 4)
_LAYERS = ("language", "layers")

# Of a dict in the metadata of a tree, as Orbax numbers the kinds of keys.
_DICT_KEY = 2

# Small enough that a device's slice reads little of its neighbours', large enough for a disk.
_CHUNK_BYTES = 1 << 27


def save(
    path: str | os.PathLike,
    config: SphinxConfig,
    params: Params,
    tokenizer: bytes | Assets,
    overwrite: bool = False,
) -> None:
    """Write a native checkpoint. Every process of a multi-process run calls this.

    The directory appears under its name only when it is complete. Raises UserError if it exists already,
    unless `overwrite` is set.
    """
    stacked, quantized = not layers_are_unstacked(params), quantized_dtype(params)
    # Orbax numbers the arrays of a Quantized; a dict's it names.
    params = jax.tree.map(_as_dict, _without_padding(config, params), is_leaf=reader.is_param)

    def options(keys: tuple[Any, ...], _: Any) -> ocp.SaveArgs:
        # At least one chunk per layer, so that a layer is read without reading the whole stack.
        in_stack = stacked and tuple(key.key for key in keys[:2]) == _LAYERS
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if in_stack else ())

    with new_directory(Path(path).absolute(), overwrite) as partial:
        if is_primary_process():
            write_json(partial / "config.json", _description(config, stacked, quantized))
            write_assets(partial, as_assets(tokenizer))
        save_args = jax.tree_util.tree_map_with_path(options, params)
        # Weights hardly compress, and compressing takes longer than writing.
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(partial / "params", args=ocp.args.PyTreeSave(params, save_args=save_args))


def _description(config: SphinxConfig, stacked: bool, quantized: QuantizedDtype | None) -> dict[str, Any]:
    """The content of config.json."""
    version = _QUANTIZED_VERSION if quantized else _VERSION
    described = {"format": _FORMAT, "version": version, "model": config.to_dict(), "stacked": stacked}
    return described | ({"quantized": _quantization(quantized)} if quantized else {})


def _quantization(dtype: QuantizedDtype) -> dict[str, Any]:
    """What config.json says of quantized weights."""
    return {"dtype": dtype, "group_size": GROUP_SIZE[dtype]}


def write(
    path: Path,
    config: SphinxConfig,
    params: ParamReader,
    paths: Iterable[tuple[str | int, ...]],
    assets: Assets,
    quantized: QuantizedDtype | None = None,
) -> None:
    """Write a native checkpoint parameter by parameter, so that memory holds one of them. One process.

    `quantized` is what the parameters are or become. Orbax reads the directory too, as numpy arrays: no sharding is
    recorded.
    """
    with new_directory(path.absolute()) as partial:
        write_json(partial / "config.json", _description(config, not params.unstacked, quantized))
        write_assets(partial, assets)
        (partial / "params").mkdir()
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{partial}/params/"}}
        tree = {}
        for keys in paths:
            param = to_quantized(keys, params.read(keys), quantized)
            for key, leaf in jax.tree_util.tree_leaves_with_path(param):
                name = (*keys, *reader.array_path(key))
                array = np.asarray(leaf)[vocab_index(config.language, keys) or ...]
                _write_array(store | {"path": f"{_name(name)}/"}, array)
                names = tuple(map(str, name))
                tree[str(names)] = {
                    "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in names],
                    "value_metadata": {
                        "value_type": "np.ndarray",
                        "skip_deserialize": False,
                        "write_shape": list(array.shape),
                    },
                }
                del leaf, array
            del param
            # jax gives back host memory that it shares with numpy at the next collection only.
            gc.collect(0)
        layout = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
        write_json(partial / "params" / "_METADATA", {"tree_metadata": tree, **layout, "custom_metadata": None})


def _as_dict(param: jax.Array | Quantized) -> Any:
    """The arrays of a Quantized by name."""
    if not isinstance(param, Quantized):
        return param
    return {reader.array_path(keys)[-1]: leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(param)}


def _write_array(store: dict[str, Any], array: np.ndarray) -> None:
    """One array, chunk by chunk: TensorStore holds a copy of what it writes."""
    chunk = _chunk_shape(array)
    spec = {"driver": "zarr", "kvstore": store, "metadata": {"chunks": list(chunk), "compressor": None}}
    opened = tensorstore.open(spec, create=True, dtype=array.dtype, shape=array.shape).result()
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(array.shape, chunk, strict=True))):
        ends = zip(corner, chunk, array.shape, strict=True)
        box = tuple(slice(start, min(start + step, size)) for start, step, size in ends)
        opened[box].write(array[box]).result()


def _chunk_shape(array: np.ndarray) -> tuple[int, ...]:
    """Runs of whole rows, at most a 64th of the array where that is worth a chunk of its own."""
    limit = min(_CHUNK_BYTES, max(1 << 20, array.nbytes // 64))
    shape, inner = list(array.shape), array.nbytes
    for dim, size in enumerate(array.shape):
        inner //= max(1, size)
        shape[dim] = max(1, min(size, limit // max(1, inner)))
        if inner <= limit:
            break
    return tuple(shape)


def _without_padding(config: SphinxConfig, params: Params) -> Params:
    """The parameters without the padding of the vocabulary, which is no part of the model."""
    for path in (EMBEDDING, HEAD):
        _, module, name = path
        index = vocab_index(config.language, path)
        leaf = params["language"].get(module, {}).get(name)
        if index and leaf is not None:
            unpadded = jax.tree.map(functools.partial(_slice_replicated, index), leaf)
            params = {**params, "language": {**params["language"], module: {name: unpadded}}}
    return params


def _slice_replicated(index: Index, leaf: jax.Array) -> jax.Array:
    """leaf[index]; the sliced dimension, which the mesh need not divide, is replicated."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        dims = [None if i < len(index) and index[i] != slice(None) else axes for i, axes in enumerate(sharding.spec)]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*dims))
    return jax.jit(lambda leaf: leaf[index], out_shardings=sharding)(leaf)


def is_native(path: Path) -> bool:
    """Whether a directory holds a native checkpoint, complete or damaged."""
    if (path / "params").is_dir():
        return True
    try:
        return read_json(path / "config.json").get("format") == _FORMAT
    except UserError:
        return False


def holds_quantized(path: Path) -> bool:
    """Whether a directory is a native checkpoint whose weights are quantized already, as far as config.json says."""
    try:
        described = read_json(path / "config.json")
    except UserError:
        return False
    return described.get("format") == _FORMAT and described.get("quantized") is not None


def load(path: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None, unstacked: bool = True) -> Loaded:
    """A native checkpoint on `mesh` (None: all devices), independent of the mesh that wrote it.

    `dtype` is "bfloat16", "float32", or None for as stored. `unstacked` makes the decoder's layers a list.
    Raises UserError that names what is missing or damaged.
    """
    return reader.load(open_directory(Path(path).absolute()), mesh, dtype, unstacked)


def open_directory(path: Path) -> CheckpointSource:
    """The directory's config and its open parameters. Reads no weights. Raises UserError."""
    config, stacked, quantized = _read_config(path)
    for name, others in (("tokenizer.model", ("tokenizer.json",)), ("params", ())):
        if not any((path / other).exists() for other in (name, *others)):
            raise UserError(f"{path} is damaged: {name} is missing; copy the whole directory again")
    return CheckpointSource(
        format="native",
        path=path,
        config=config,
        shards=[_stored_tensors(path, config, stacked)],
        mappings=lambda unstacked: _param_mappings(config, unstacked, quantized),
        quantized=quantized,
    )


def _read_config(path: Path) -> tuple[SphinxConfig, bool, QuantizedDtype | None]:
    """The model's config, whether its layers are stored stacked, and how they are quantized. Raises UserError."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a sphinx-jax checkpoint: it has no config.json")
    described = read_json(file)
    if described.get("format") != _FORMAT:
        raise UserError(f'{file} does not describe a sphinx-jax checkpoint: it lacks "format": "{_FORMAT}"')
    if described.get("version") in _OLD_QUANTIZED_VERSIONS:
        raise UserError(
            f"{file} describes weights quantized by an earlier version, which this one cannot read; convert the "
            "unquantized checkpoint again"
        )
    if described.get("version") not in (_VERSION, _QUANTIZED_VERSION):
        raise UserError(
            f"{file} has version {described.get('version')!r} and this program reads versions {_VERSION} and "
            f"{_QUANTIZED_VERSION}; update it"
        )
    if not isinstance(described.get("stacked"), bool):
        raise UserError(f'{file} lacks "stacked": true or false')
    check_types(file, "model", SphinxConfig(), described.get("model"))
    try:
        config = SphinxConfig.from_dict(described.get("model") or {})
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    check_decoder(file, config.language)
    if config.vision:
        check_vision(file, config.vision)
    quantized = _read_quantized(file, described.get("quantized"))
    if bool(quantized) != (described["version"] == _QUANTIZED_VERSION) or (quantized and described["stacked"]):
        raise UserError(f"{file} is damaged: version, quantized and stacked contradict each other; convert it again")
    return config, described["stacked"], quantized


def _read_quantized(file: Path, described: Any) -> QuantizedDtype | None:
    """The dtype of quantized weights. Raises UserError if their layout is not the one of this program."""
    if described is None:
        return None
    dtype = described.get("dtype") if isinstance(described, dict) else None
    if dtype not in tuple(GROUP_SIZE) or described != _quantization(dtype):
        raise UserError(
            f"{file} describes weights quantized as {described!r:.200}, a layout that this program does not read; "
            "convert the unquantized checkpoint again"
        )
    return dtype


def _param_mappings(
    config: SphinxConfig, unstacked: bool, quantized: QuantizedDtype | None = None
) -> list[ParamMapping]:
    """Mappings of each parameter from the stored one of its name; a stack from the parameters of its layers."""
    _, abstract = abstract_model(config, make_mesh(), None, unstacked, quantized)
    mappings = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        path = reader.array_path(keys)
        # Integers are not converted, nor are their scales.
        dtype = str(leaf.dtype) if reader.is_in_quantized(keys) else None
        if path[:2] == _LAYERS and not unstacked:
            shape = leaf.shape[1:]
            names: list[tuple[str, Index]] = [(_name((*path[:2], i, *path[2:])), (i,)) for i in range(leaf.shape[0])]
        else:
            shape = unpadded_shape(config.language, path, leaf.shape)
            names = [(_name(path), vocab_index(config.language, path))]
        order = tuple(range(len(shape)))
        mappings += [ParamMapping(name, shape, path, index, shape, order, dtype=dtype) for name, index in names]
    return mappings


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


class _StoredTensor:
    """A stored array, or one layer of it; indexing reads. Raises UserError where its data is damaged."""

    def __init__(self, name: str, array: tensorstore.TensorStore):
        self.shape = tuple(array.shape)
        self.dtype = array.dtype.numpy_dtype
        self._name = name
        self._array = array

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return self._array[index].read().result()
        except (ValueError, OSError) as error:
            raise _damaged_error(self._name, error) from error


def _stored_tensors(path: Path, config: SphinxConfig, stacked: bool) -> dict[str, Tensor]:
    """The stored parameters by name. Stacked layers appear as if they had been stored unstacked."""
    tensors: dict[str, Tensor] = {}
    prefix = _name(_LAYERS) + "."
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/params/"}}
    try:
        keys = tensorstore.KvStore.open(store).result().list().result()
    except (ValueError, OSError) as error:
        raise _damaged_error(f"{path}/params", error) from error
    if not keys:
        raise UserError(f"{path}/params is damaged, copy the whole checkpoint again: it holds no arrays")
    for name in sorted(key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")):
        # Missing data would otherwise read as zeros.
        spec = {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}, "fill_missing_data_reads": False}
        label = f"{name} in {path}/params"
        try:
            array = tensorstore.open(spec, read=True, open=True).result()
        except (ValueError, OSError) as error:
            raise _damaged_error(label, error) from error
        if stacked and name.startswith(prefix):
            for i in range(array.shape[0]):
                tensors[f"{prefix}{i}.{name.removeprefix(prefix)}"] = _StoredTensor(label, array[i])
        else:
            tensors[name] = _StoredTensor(label, array)
    return tensors


def _damaged_error(name: str, error: Exception) -> UserError:
    reason = str(error).split(" [", 1)[0]
    return UserError(f"{name} is damaged, copy the whole checkpoint again: {reason}")
