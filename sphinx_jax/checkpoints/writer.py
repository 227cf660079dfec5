"""From devices to files: parameters converted to published tensors, one at a time."""

import contextlib
import errno
import functools
import gc
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import barrier, is_primary_process
from sphinx_jax.checkpoints.io.copying import boxes, copy
from sphinx_jax.checkpoints.loaded_model import Params, layers_are_unstacked
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.errors import UserError

ParamPath = tuple[str | int, ...]
WriteTensor = Callable[[int, str, Iterator[np.ndarray]], None]

_CHUNK_ELEMENTS = 1 << 20


@runtime_checkable
class ParamReader(Protocol):
    """A source of parameters to write. `unstacked`: the decoder's layers are a list, not stacked."""

    unstacked: bool

    def dtype(self, path: ParamPath) -> np.dtype: ...

    def read(self, path: ParamPath) -> jax.Array: ...


class InMemoryParams:
    """A parameter tree as a ParamReader."""

    def __init__(self, params: Params):
        self.unstacked = layers_are_unstacked(params)
        leaves: list[tuple[Any, Any]] = jax.tree_util.tree_leaves_with_path(params)
        self._leaves = {tuple(key.key for key in keys): leaf for keys, leaf in leaves}

    def dtype(self, path: ParamPath) -> np.dtype:
        return self._leaves[path].dtype

    def read(self, path: ParamPath) -> jax.Array:
        return self._leaves[path]


def check_destination(path: Path, overwrite: bool = False) -> None:
    """Raises UserError if `path` is a file, or a directory that is not empty unless `overwrite` is set."""
    if "\0" in str(path):
        raise UserError(f"cannot write {str(path)!r:.300}: it holds a NUL; choose another directory")
    try:
        if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
            raise UserError(f"{path} exists already; choose another directory or remove it")
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        if not parent.is_dir():
            raise UserError(f"cannot write {path}: {parent} is a file; choose another directory")
        if not os.access(parent, os.W_OK):
            raise UserError(f"cannot write {path}: {parent} is not writable; choose another directory")
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r:.300}: {error.strerror}; choose another directory") from error


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that is renamed to `path` when the block ends without an error.

    Every process of a multi-process run enters; the primary process creates and renames the directory. Raises
    UserError if `path` exists and is not empty, unless `overwrite` is set.
    """
    check_destination(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    created = _missing_parents(path)
    try:
        if is_primary_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier("directory created")
        yield partial
    except BaseException as error:
        if is_primary_process():
            shutil.rmtree(partial, ignore_errors=True)
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        if (reason := why_not_written(error)) is not None:
            raise UserError(f"cannot write {path}: {reason}; free some space, or choose another directory") from error
        raise
    barrier("directory written")
    if is_primary_process():
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    barrier("directory renamed")


def _missing_parents(path: Path) -> list[Path]:
    """The directories above `path` that do not exist yet, the innermost first."""
    try:
        return [parent for parent in path.parents if not parent.exists()]
    except OSError:
        return []


def why_not_written(error: BaseException) -> str | None:
    """Why the file system refused to write; None if `error` is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # Orbax and TensorStore pass on the system's error as text.
    found = _SYSTEM_ERROR.search(str(error)) if isinstance(error, Exception) else None
    return found[0] if found else None


_SYSTEM_ERROR = re.compile(
    "|".join(os.strerror(code) for code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO))
)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """`values` as indented JSON."""
    file.write_text(json.dumps(values, indent=2) + "\n")


def by_param(mappings: Iterable[ParamMapping]) -> list[ParamMapping]:
    """The mappings with those of one parameter next to each other, parameters in the order of their first mapping."""
    groups: dict[ParamPath, list[ParamMapping]] = {}
    for mapping in mappings:
        groups.setdefault(mapping.path, []).append(mapping)
    return list(itertools.chain.from_iterable(groups.values()))


def write_tensors(mappings: Sequence[ParamMapping], params: ParamReader, shards: int, write: WriteTensor) -> None:
    """Call write(shard, name, chunks) for every tensor of every shard, in the order of `mappings`.

    The chunks are consecutive parts of the tensor in memory order. Memory holds one parameter, and little more, if
    `mappings` are as `by_param` orders them. Every process calls this, since gathering a block from several hosts is
    a collective; the primary one writes.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, group in itertools.groupby(mappings, lambda mapping: mapping.path):
            _write_param(params.read(path), group, shards, write, pool)
            # jax gives back host memory that it shares with numpy at the next collection only.
            gc.collect(0)


def _write_param(
    param: jax.Array, mappings: Iterable[ParamMapping], shards: int, write: WriteTensor, pool: Executor
) -> None:
    """Write the tensors of one parameter."""
    for leading, group in itertools.groupby(mappings, _leading_integers):
        block = _to_host(param, leading)
        for mapping in group:
            if is_primary_process():
                tensor = mapping.in_view_order(block[mapping.index[len(leading) :]])
                for shard in [mapping.expert_shard(shards)] if mapping.expert else range(shards):
                    write(shard, mapping.name, _chunks(_shard_of(tensor, mapping, shards, shard), pool))


def _shard_of(tensor: np.ndarray, mapping: ParamMapping, shards: int, shard: int) -> np.ndarray:
    """What one file of `shards` holds of a tensor in view order."""
    return tensor if mapping.shard_dim is None else np.split(tensor, shards, mapping.shard_dim)[shard]


def _chunks(tensor: np.ndarray, pool: Executor) -> Iterator[np.ndarray]:
    """Consecutive parts of a tensor in C order, at most a 16th of it where that is worth a chunk."""
    for box in boxes(tensor.shape, max(_CHUNK_ELEMENTS, tensor.size // 16)):
        part = tensor[(*box, ...)]
        chunk = np.empty(part.shape, part.dtype)
        copy(chunk, part, pool)
        yield chunk


def _leading_integers(mapping: ParamMapping) -> tuple[int, ...]:
    """The integers that `index` begins with: the layer of a stack, an expert."""
    leading: list[int] = []
    for index in mapping.index:
        if not isinstance(index, int):
            break
        leading.append(index)
    return tuple(leading)


def _to_host(leaf: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """leaf[index] on this host, whichever devices hold it."""
    sharding = leaf.sharding
    # numpy sees the memory of a CPU device; of other devices' only the block is copied.
    is_host_memory = len(sharding.device_set) == 1 and next(iter(sharding.device_set)).platform == "cpu"
    if leaf.is_fully_addressable and (is_host_memory or not index):
        return np.asarray(leaf)[index]
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return np.asarray(_compile_select(mesh)(leaf, *index).addressable_data(0))


@functools.cache
def _compile_select(mesh: Any) -> Callable[..., jax.Array]:
    """leaf[index], replicated over the mesh."""
    replicated = NamedSharding(mesh, PartitionSpec()) if isinstance(mesh, Mesh) else None
    return jax.jit(lambda leaf, *index: leaf[index], out_shardings=replicated)
