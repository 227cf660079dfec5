"""From devices to files: parameters taken apart into published tensors, one at a time."""

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

Keys = tuple[str | int, ...]


class Source(Protocol):
    """Where parameters to be written come from. `unstacked` says how the decoder's layers are held."""

    unstacked: bool

    def dtype(self, path: Keys) -> np.dtype: ...

    def read(self, path: Keys) -> jax.Array: ...


class InMemory:
    """A parameter tree as a Source."""

    def __init__(self, params: Params):
        self.unstacked = layers_are_unstacked(params)
        self._leaves = {
            tuple(key.key for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
        }

    def dtype(self, path: Keys) -> np.dtype:
        return self._leaves[path].dtype

    def read(self, path: Keys) -> jax.Array:
        return self._leaves[path]


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raises UserError if `path` is a file, or a directory that is not empty unless `overwrite` is set."""
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        raise UserError(f"{path} exists already; choose another directory or remove it")


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which appears as `path` when the block ends without an error.

    Every process of a multi-process run enters; the first makes and moves the directory. Raises UserError
    if `path` exists and is not empty, unless `overwrite` is set.
    """
    check_new(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    if is_primary_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier("directory made")
    try:
        yield partial
    except BaseException:
        if is_primary_process():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    barrier("directory filled")
    if is_primary_process():
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    barrier("directory moved")


def write_json(file: Path, values: dict[str, Any]) -> None:
    """`values` as indented JSON."""
    file.write_text(json.dumps(values, indent=2) + "\n")


def export(
    entries: Sequence[ParamMapping], source: Source, shards: int, write: Callable[[int, str, np.ndarray], None]
) -> None:
    """Call write(shard, name, tensor) for every tensor of every shard, in the order of `entries`.

    Every process calls this, since fetching a block from many hosts takes all of them; the first writes.
    """
    # Parameters and blocks that entries next to each other share.
    read = functools.lru_cache(maxsize=2)(source.read)
    fetch = functools.lru_cache(maxsize=2)(lambda path, at: _fetch(read(path), at))
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for entry in entries:
            lead = _leading(entry)
            block = fetch(entry.path, lead)[entry.index[len(lead) :]]
            if not is_primary_process():
                continue
            whole = entry.in_view_order(block)
            for shard in [entry.owner(shards)] if entry.member else range(shards):
                part = whole if entry.split is None else np.split(whole, shards, entry.split)[shard]
                ordered = np.empty(part.shape, part.dtype)
                copy(ordered, part, pool)
                write(shard, entry.name, ordered.reshape(entry.shard_shape(shards)))


def _leading(entry: ParamMapping) -> tuple[int, ...]:
    """The integers that `index` begins with: the layer of a stack, an expert."""
    count = next((i for i, at in enumerate(entry.index) if not isinstance(at, int)), len(entry.index))
    return entry.index[:count]


def _fetch(leaf: jax.Array, at: tuple[int, ...]) -> np.ndarray:
    """leaf[at] on this host, wherever its parts are."""
    if not at and leaf.is_fully_addressable:
        return np.asarray(leaf)
    sharding = leaf.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return np.asarray(_picker(mesh)(leaf, *at).addressable_data(0))


@functools.cache
def _picker(mesh: Mesh | None) -> Callable[..., jax.Array]:
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda leaf, *at: leaf[at], out_shardings=everywhere)
