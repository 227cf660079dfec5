"""From devices to files: parameters converted to published tensors, one at a time."""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import barrier, is_primary_process
from sphinx_jax.checkpoints.io.copying import copy
from sphinx_jax.checkpoints.loaded_model import Params, layers_are_unstacked
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.errors import UserError

ParamPath = tuple[str | int, ...]


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
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        raise UserError(f"{path} exists already; choose another directory or remove it")


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that is renamed to `path` when the block ends without an error.

    Every process of a multi-process run enters; the primary process creates and renames the directory. Raises
    UserError if `path` exists and is not empty, unless `overwrite` is set.
    """
    check_destination(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    if is_primary_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier("directory created")
    try:
        yield partial
    except BaseException:
        if is_primary_process():
            shutil.rmtree(partial, ignore_errors=True)
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


def write_json(file: Path, values: dict[str, Any]) -> None:
    """`values` as indented JSON."""
    file.write_text(json.dumps(values, indent=2) + "\n")


def write_tensors(
    mappings: Sequence[ParamMapping], params: ParamReader, shards: int, write: Callable[[int, str, np.ndarray], None]
) -> None:
    """Call write(shard, name, tensor) for every tensor of every shard, in the order of `mappings`.

    Every process calls this, since gathering a block from several hosts is a collective; the primary one writes.
    """
    # Consecutive mappings often share a parameter or a block.
    read = functools.lru_cache(maxsize=2)(params.read)
    fetch = functools.lru_cache(maxsize=2)(lambda path, index: _to_host(read(path), index))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for mapping in mappings:
            leading = _leading_integers(mapping)
            block = fetch(mapping.path, leading)[mapping.index[len(leading) :]]
            if not is_primary_process():
                continue
            unsharded = mapping.in_view_order(block)
            for shard in [mapping.expert_shard(shards)] if mapping.expert else range(shards):
                part = unsharded if mapping.shard_dim is None else np.split(unsharded, shards, mapping.shard_dim)[shard]
                ordered = np.empty(part.shape, part.dtype)
                copy(ordered, part, pool)
                write(shard, mapping.name, ordered.reshape(mapping.shard_shape(shards)))


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
    if not index and leaf.is_fully_addressable:
        return np.asarray(leaf)
    sharding = leaf.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return np.asarray(_compile_select(mesh)(leaf, *index).addressable_data(0))


@functools.cache
def _compile_select(mesh: Any) -> Callable[..., jax.Array]:
    """leaf[index], replicated over the mesh."""
    replicated = NamedSharding(mesh, PartitionSpec()) if isinstance(mesh, Mesh) else None
    return jax.jit(lambda leaf, *index: leaf[index], out_shardings=replicated)
