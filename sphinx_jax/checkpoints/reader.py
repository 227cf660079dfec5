"""From files to devices: each device's slice of each parameter is read for it alone.

The host holds one slice at a time and the file pages that it is copied from, nothing more. Meanwhile the
next parameter is read ahead into the page cache.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sphinx_jax.checkpoints import lora
from sphinx_jax.checkpoints.io.copying import aligned_empty, copy, has_nan
from sphinx_jax.checkpoints.loaded_model import Loaded, Params, abstract_model, layers_are_unstacked, model_mesh
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.checkpoints.source import CheckpointSource, Piece, Tensor, match
from sphinx_jax.errors import UserError

# How far reading ahead may run in front of copying: far enough for the largest parameters to overlap, and
# not so far that a host with little memory evicts pages before they are used.
_AHEAD_BYTES = 1 << 30

Box = tuple[slice, ...]
Path = tuple[str | int, ...]
Parts = list[tuple[ParamMapping, list[Piece]]]
Keep = Callable[[Path, jax.Array], Any]
Meanwhile = Callable[[Loaded], None]


def load(
    opened: CheckpointSource,
    mesh: Mesh | None,
    dtype: str | None,
    unstacked: bool,
    keep: Keep | None = None,
    on_abstract_model: Meanwhile | None = None,
) -> Loaded:
    """The checkpoint's model on `mesh` (None: all devices), in `dtype` (None: as stored).

    `keep` is called with the path and the array of each parameter as soon as it is read, and what it returns stands
    in the parameter's place. `on_abstract_model` is called beside the reading, in a thread of its own, with the model as it
    will be but for `keep`, its parameters abstract.

    Everything that can be known without reading the weights is checked before any device memory is used.
    Raises UserError, and then nothing is loaded.
    """
    mesh = mesh or model_mesh(opened.config)
    parts = match(opened, unstacked)
    graph, abstract = abstract_model(opened.config, mesh, dtype, unstacked)
    tokenizer_bytes = opened.tokenizer_bytes
    whole = lambda by_path: jax.tree_util.tree_map_with_path(lambda keys, _: by_path[_path(keys)], abstract)
    made = lambda by_path: Loaded(opened.config, graph, whole(by_path), tokenizer_bytes, mesh)
    with ThreadPoolExecutor(1) as beside, Reader(opened, parts, abstract, dtype) as reader:
        done = beside.submit(on_abstract_model or (lambda _: None), made(reader.targets))

        def kept(path: Path, array: jax.Array) -> Any:
            if done.done():
                # What went wrong there is told now, and not after minutes of reading.
                done.result()
            return keep(path, array) if keep else array

        loaded = made(reader.read_all(kept))
        done.result()
    return loaded


class Reader:
    """Reads the parameters of an opened checkpoint, each onto the sharding that `abstract` gives it.

    `parts` is what `match` made of the checkpoint. Use as a context manager.
    """

    def __init__(self, opened: CheckpointSource, parts: Parts, abstract: Params, dtype: str | None):
        self.unstacked = layers_are_unstacked(abstract)
        self._opened = opened
        self._parts: dict[Path, Parts] = {}
        for entry, pieces in parts:
            self._parts.setdefault(entry.path, []).append((entry, pieces))
        leaves = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        for path in leaves.keys() | self._parts.keys():
            filled = sum(math.prod(entry.shape) for entry, _ in self._parts.get(path, []))
            if path not in leaves or filled != leaves[path].size:
                raise ValueError(f"the {opened.format} layout does not fill {path}: {filled} numbers")
        self.targets = {path: self._target(leaves[path], parts, dtype) for path, parts in self._parts.items()}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count()))
        self._ahead = ThreadPoolExecutor(1)
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or jax.process_index() != 0,
        )
        self._task = self._progress.add_task(
            f"loading {opened.path.name}", total=sum(_local_bytes(target) for target in self.targets.values())
        )

    @staticmethod
    def _target(leaf: jax.ShapeDtypeStruct, parts: Parts, dtype: str | None) -> jax.ShapeDtypeStruct:
        stored = {piece.tensor.dtype.name for _, pieces in parts for piece in pieces}
        # float64 has no place on devices; parts of different types meet in one that holds them all.
        as_stored = stored.pop() if len(stored) == 1 and "float64" not in stored else "float32"
        return jax.ShapeDtypeStruct(leaf.shape, dtype or as_stored, sharding=leaf.sharding)

    def dtype(self, path: Path) -> np.dtype:
        """The type in which a parameter will be read."""
        return np.dtype(self.targets[path].dtype)

    def __enter__(self) -> "Reader":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self._pool.shutdown()
        self._progress.stop()

    def read_all(self, keep: Keep) -> dict[Path, Any]:
        """What is kept of every parameter, read in the order in which the files hold them."""
        arrays: dict[Path, Any] = {}
        upcoming = list(self._parts)
        ahead = 0
        for path in self._parts:
            while upcoming and ahead < _AHEAD_BYTES:
                ahead += self._stored_bytes(upcoming[0])
                self._ahead.submit(self._prefetch, upcoming.pop(0))
            arrays[path] = keep(path, self.read(path))
            ahead -= self._stored_bytes(path)
        return arrays

    def read(self, path: Path) -> jax.Array:
        """One parameter. Raises UserError if it holds a number that is not one."""
        target = self.targets[path]
        devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
            devices_of.setdefault(_bounds(index, target.shape), []).append(device)
        parts: list[jax.Array] = []
        for bounds, devices in devices_of.items():
            host = self._read_slice(path, tuple(slice(*b) for b in bounds), target.dtype)
            first = jax.block_until_ready(jax.device_put(host, devices[0]))
            del host
            parts += [first, *(jax.device_put(first, device) for device in devices[1:])]
        array = jax.make_array_from_single_device_arrays(target.shape, target.sharding, parts)
        add = lambda so_far, adapters: lora.merged(so_far, path, adapters)
        return functools.reduce(add, self._opened.adapters, array)

    def _read_slice(self, path: Path, box: Box, dtype: np.dtype) -> np.ndarray:
        out = aligned_empty(tuple(s.stop - s.start for s in box), np.dtype(dtype))
        filled = [(entry.name, self._fill(out, box, entry, pieces)) for entry, pieces in self._parts[path]]
        if has_nan(out):
            names = [name for name, target in filled if target is not None and np.isnan(target).any()]
            raise UserError(
                f"{self._opened.path} is damaged: {', '.join(names)} holds NaNs; download it again, or go back to a "
                "checkpoint from before"
            )
        return out

    def _fill(self, out: np.ndarray, box: Box, entry: ParamMapping, pieces: list[Piece]) -> np.ndarray | None:
        """Write what `entry` has of the parameter's `box` to its place in `out`; the place, None if it has nothing."""
        index = (*entry.index, *[slice(None)] * (len(box) - len(entry.index)))
        place: list[int | slice] = []
        wanted: list[tuple[int, int]] = []
        for want, ours in zip(box, index, strict=True):
            if isinstance(ours, int):
                if not want.start <= ours < want.stop:
                    return None
                place.append(ours - want.start)
            else:
                begin = ours.start or 0
                end = begin + entry.block_shape[len(wanted)]
                low, high = max(begin, want.start), min(end, want.stop)
                if low >= high:
                    return None
                place.append(slice(low - want.start, high - want.start))
                wanted.append((low - begin, high - begin))
        bounds = _view_bounds(entry, wanted)
        target = entry.in_view_order(out[tuple(place)], tuple(high - low for low, high in bounds))

        def copied(elements: int) -> None:
            self._progress.advance(self._task, elements * out.itemsize)
            for file in self._opened.files:
                file.release()

        for piece in pieces:
            common = [
                (max(low, start), min(high, start + size))
                for (low, high), start, size in zip(bounds, piece.start, piece.tensor.shape, strict=True)
            ]
            if all(low < high for low, high in common):
                inside = tuple(slice(low - s, high - s) for (low, high), s in zip(common, piece.start, strict=True))
                to = tuple(slice(low - b, high - b) for (low, high), (b, _) in zip(common, bounds, strict=True))
                copy(target[to], piece.tensor[inside], self._pool, copied)
        return target

    def _prefetch(self, path: Path) -> None:
        """Only a hint to the operating system: what goes wrong here goes wrong again, and is told, in `read`."""
        # A process that needs only a part of the array reads just that, as it is asked for.
        if self.targets[path].sharding.is_fully_addressable:
            for tensor in self._tensors(path):
                for file in self._opened.files:
                    file.prefetch(tensor)

    def _tensors(self, path: Path) -> list[Tensor]:
        return [piece.tensor for _, pieces in self._parts[path] for piece in pieces]

    def _stored_bytes(self, path: Path) -> int:
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self._tensors(path))


def _path(keys: tuple[jax.tree_util.DictKey, ...]) -> Path:
    return tuple(key.key for key in keys)


def _bounds(index: Box, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _local_bytes(target: jax.ShapeDtypeStruct) -> int:
    """Bytes of the distinct slices that this process's devices hold."""
    slices = {_bounds(i, target.shape) for i in target.sharding.addressable_devices_indices_map(target.shape).values()}
    return sum(math.prod(high - low for low, high in bounds) for bounds in slices) * target.dtype.itemsize


def _view_bounds(entry: ParamMapping, wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The part of the entry's view that the `wanted` part of its block comes from."""
    bounds = [(0, size) for size in entry.view]
    for (low, high), group, size in zip(wanted, entry.groups, entry.block_shape, strict=True):
        if len(group) == 1:
            bounds[group[0]] = (low, high)
        elif (low, high) != (0, size):
            raise ValueError(f"{entry.path} is interleaved in {entry.name} along a dimension that devices divide")
    return bounds
