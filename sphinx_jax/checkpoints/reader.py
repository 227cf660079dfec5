"""From files to devices: each device's slice of each parameter is read for that device alone.

Host memory holds one slice at a time and the file pages that it is copied from. The next parameters are
prefetched into the page cache while one is copied.
"""

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
from sphinx_jax.checkpoints.mapping.language import vocab_padding
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.checkpoints.source import CheckpointSource, FileSlice, MatchedMappings, Tensor, match
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import Quantized

# Bytes prefetched ahead of copying: enough for the largest parameters to overlap, and not so much that a host
# with little memory evicts pages before they are used.
_PREFETCH_BYTES = 1 << 30

Box = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]
ParamPath = tuple[str | int, ...]
Transform = Callable[[ParamPath, jax.Array], Any]
AbstractModelCallback = Callable[[Loaded], None]


def load(
    source: CheckpointSource,
    mesh: Mesh | None,
    dtype: str | None,
    unstacked: bool,
    transform: Transform | None = None,
    on_abstract_model: AbstractModelCallback | None = None,
) -> Loaded:
    """The checkpoint's model on `mesh` (None: all devices), in `dtype` (None: as stored).

    `transform(path, parameter)` is called with each parameter, an array or Quantized, as soon as it is read; its result
    replaces the parameter.
    `on_abstract_model` is called in a thread of its own while weights are read, with the model before any
    `transform` and with abstract parameters.

    Everything that can be checked without reading weights is checked before any device memory is used.
    Raises UserError, and then nothing is loaded.
    """
    mesh = mesh or model_mesh(source.config)
    matched = match(source, unstacked)
    graph, abstract = abstract_model(source.config, mesh, dtype, unstacked, source.quantized)
    assets = source.assets

    def loaded_model(by_path: dict[ParamPath, Any]) -> Loaded:
        params = jax.tree_util.tree_map_with_path(lambda keys, _: by_path[array_path(keys)], abstract, is_leaf=is_param)
        tokenizer_bytes = assets.get("tokenizer.model")
        path, tokens = str(source.path), source.expected_tokens
        return Loaded(source.config, graph, params, tokenizer_bytes, mesh, assets, path, tokens)

    with ThreadPoolExecutor(1) as executor, CheckpointReader(source, matched, abstract, dtype) as reader:
        callback = executor.submit(on_abstract_model or (lambda _: None), loaded_model(reader.targets))

        def on_read(path: ParamPath, param: Any) -> Any:
            if callback.done():
                # An error of the callback is raised now, not after minutes of reading.
                callback.result()
            return transform(path, param) if transform else param

        loaded = loaded_model(reader.read_all(on_read))
        callback.result()
    return loaded


class CheckpointReader:
    """Reads the parameters of an opened checkpoint, each onto the sharding that `abstract` gives it.

    `matched` is the result of `match`. Use as a context manager.
    """

    def __init__(self, source: CheckpointSource, matched: MatchedMappings, abstract: Params, dtype: str | None):
        self.unstacked = layers_are_unstacked(abstract)
        self._source = source
        self._matched: dict[ParamPath, MatchedMappings] = {}
        self._padded_paths: set[ParamPath] = set()
        for mapping, slices in matched:
            self._matched.setdefault(mapping.path, []).append((mapping, slices))
        # A parameter is an array, or the arrays of a Quantized.
        leaves = {array_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        params = {array_path(k): p for k, p in jax.tree_util.tree_leaves_with_path(abstract, is_leaf=is_param)}
        self._arrays = {
            path: jax.tree_util.tree_map_with_path(lambda keys, _, path=path: (*path, *array_path(keys)), param)
            for path, param in params.items()
        }
        for path in leaves.keys() | self._matched.keys():
            filled = sum(math.prod(mapping.shape) for mapping, _ in self._matched.get(path, []))
            shape = leaves[path].shape if path in leaves else ()
            padding = vocab_padding(source.config.language, path, shape)
            if path not in leaves or filled != math.prod(shape) - padding:
                raise ValueError(f"the {source.format} layout does not fill {path}: {filled} numbers")
            if padding:
                self._padded_paths.add(path)
        self._targets = {path: self._target(leaves[path], parts, dtype) for path, parts in self._matched.items()}
        self.targets: dict[ParamPath, Any] = {path: self._of_arrays(path, self._targets.__getitem__) for path in params}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._prefetcher = ThreadPoolExecutor(1)
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or jax.process_index() != 0,
        )
        self._task = self._progress.add_task(
            f"loading {source.path.name}", total=sum(_local_bytes(target) for target in self._targets.values())
        )

    def _of_arrays(self, path: ParamPath, function: Callable[[ParamPath], Any]) -> Any:
        """The parameter at `path` with `function(path of the array)` in place of each of its arrays."""
        return jax.tree.map(function, self._arrays[path], is_leaf=lambda node: isinstance(node, tuple))

    @staticmethod
    def _target(leaf: jax.ShapeDtypeStruct, matched: MatchedMappings, dtype: str | None) -> jax.ShapeDtypeStruct:
        if (fixed := matched[0][0].dtype) is not None:
            return jax.ShapeDtypeStruct(leaf.shape, fixed, sharding=leaf.sharding)
        stored = {file_slice.tensor.dtype.name for _, slices in matched for file_slice in slices}
        # Devices have no float64; slices of different dtypes are read into float32, which holds them all.
        as_stored = stored.pop() if len(stored) == 1 and "float64" not in stored else "float32"
        return jax.ShapeDtypeStruct(leaf.shape, dtype or as_stored, sharding=leaf.sharding)

    def dtype(self, path: ParamPath) -> np.dtype:
        """The dtype in which a parameter will be read."""
        return np.dtype(self.targets[path].dtype)

    def __enter__(self) -> "CheckpointReader":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._prefetcher.shutdown(cancel_futures=True)
        self._pool.shutdown()
        self._progress.stop()

    def read_all(self, transform: Transform) -> dict[ParamPath, Any]:
        """The transform of every parameter, read in file order."""
        params: dict[ParamPath, Any] = {}
        upcoming = list(self._matched)
        prefetched = 0
        for path in self._paths_in_file_order():
            while upcoming and prefetched < _PREFETCH_BYTES:
                prefetched += self._stored_bytes(upcoming[0])
                self._prefetcher.submit(self._prefetch, upcoming.pop(0))
            params[path] = transform(path, self.read(path))
            prefetched -= sum(map(self._stored_bytes, self._array_paths(path)))
        return params

    def _paths_in_file_order(self) -> list[ParamPath]:
        owner = {array: path for path in self._arrays for array in self._array_paths(path)}
        return list(dict.fromkeys(owner[array] for array in self._matched))

    def _array_paths(self, path: ParamPath) -> list[ParamPath]:
        return jax.tree.leaves(self._arrays[path], is_leaf=lambda node: isinstance(node, tuple))

    def read(self, path: ParamPath) -> Any:
        """One parameter, an array or Quantized, adapters merged. Raises UserError if it holds NaNs."""
        return self._of_arrays(path, self._read_array)

    def _read_array(self, path: ParamPath) -> jax.Array:
        target = self._targets[path]
        devices_of: dict[Bounds, list[Any]] = {}
        for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
            devices_of.setdefault(_bounds(index, target.shape), []).append(device)
        parts: list[jax.Array] = []
        for bounds, devices in devices_of.items():
            host = self._read_slice(path, tuple(slice(*b) for b in bounds), target.dtype)
            first = jax.block_until_ready(jax.device_put(host, devices[0]))
            del host
            parts += [first, *(jax.device_put(first, device) for device in devices[1:])]
        array = jax.make_array_from_single_device_arrays(target.shape, target.sharding, parts)
        for adapters in self._source.adapters:
            array = lora.merge_adapter(array, path, adapters)
        return array

    def _read_slice(self, path: ParamPath, box: Box, dtype: np.dtype) -> np.ndarray:
        """The `box` of a parameter in host memory."""
        out = aligned_empty(tuple(s.stop - s.start for s in box), np.dtype(dtype))
        if path in self._padded_paths:
            out[...] = 0
        filled = [(mapping.name, self._fill(out, box, mapping, slices)) for mapping, slices in self._matched[path]]
        if out.dtype.kind not in "iu" and has_nan(out):
            names = [name for name, target in filled if target is not None and np.isnan(target).any()]
            raise UserError(
                f"{self._source.path} is damaged: {', '.join(names)} holds NaNs; download it again, or use an earlier "
                "checkpoint"
            )
        return out

    def _fill(self, out: np.ndarray, box: Box, mapping: ParamMapping, slices: list[FileSlice]) -> np.ndarray | None:
        """Copy the intersection of `mapping` and the parameter's `box` into `out`.

        Returns the view of `out` that was written, None if they do not intersect.
        """
        index = (*mapping.index, *[slice(None)] * (len(box) - len(mapping.index)))
        # Where the block is in `out`, and which part of the block the box covers.
        out_index: list[int | slice] = []
        block_bounds: list[tuple[int, int]] = []
        for box_slice, block_index in zip(box, index, strict=True):
            if isinstance(block_index, int):
                if not box_slice.start <= block_index < box_slice.stop:
                    return None
                out_index.append(block_index - box_slice.start)
            else:
                begin = block_index.start or 0
                end = begin + mapping.block_shape[len(block_bounds)]
                low, high = max(begin, box_slice.start), min(end, box_slice.stop)
                if low >= high:
                    return None
                out_index.append(slice(low - box_slice.start, high - box_slice.start))
                block_bounds.append((low - begin, high - begin))
        view_bounds = _view_bounds(mapping, block_bounds)
        target = mapping.in_view_order(out[tuple(out_index)], tuple(high - low for low, high in view_bounds))

        def on_progress(elements: int) -> None:
            self._progress.advance(self._task, elements * out.itemsize)
            for file in self._source.files:
                file.release()

        for file_slice in slices:
            common = [
                (max(low, start), min(high, start + size))
                for (low, high), start, size in zip(view_bounds, file_slice.start, file_slice.tensor.shape, strict=True)
            ]
            if all(low < high for low, high in common):
                from_file = tuple(
                    slice(low - s, high - s) for (low, high), s in zip(common, file_slice.start, strict=True)
                )
                to_target = tuple(
                    slice(low - b, high - b) for (low, high), (b, _) in zip(common, view_bounds, strict=True)
                )
                copy(target[to_target], file_slice.tensor[from_file], self._pool, on_progress)
        return target

    def _prefetch(self, path: ParamPath) -> None:
        """A hint to the operating system. An error here is ignored: `read` meets it again and raises it."""
        # A process that needs only part of the array reads just that, on demand.
        if self._targets[path].sharding.is_fully_addressable:
            for tensor in self._tensors(path):
                if isinstance(tensor, np.ndarray):
                    for file in self._source.files:
                        file.prefetch(tensor)

    def _tensors(self, path: ParamPath) -> list[Tensor]:
        return [file_slice.tensor for _, slices in self._matched[path] for file_slice in slices]

    def _stored_bytes(self, path: ParamPath) -> int:
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self._tensors(path))


def is_param(node: Any) -> bool:
    """Whether a node of a tree of parameters is one with several arrays."""
    return isinstance(node, Quantized)


def array_path(keys: tuple[Any, ...]) -> ParamPath:
    """The path of an array: that of its parameter, and its name in a Quantized."""
    return tuple(key.name if isinstance(key, jax.tree_util.GetAttrKey) else key.key for key in keys)


def is_in_quantized(keys: tuple[Any, ...]) -> bool:
    """Whether an array is one of those of a Quantized."""
    return bool(keys) and isinstance(keys[-1], jax.tree_util.GetAttrKey)


def _bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _local_bytes(target: jax.ShapeDtypeStruct) -> int:
    """Bytes of the distinct slices that this process's devices hold."""
    slices = {_bounds(i, target.shape) for i in target.sharding.addressable_devices_indices_map(target.shape).values()}
    return sum(math.prod(high - low for low, high in bounds) for bounds in slices) * target.dtype.itemsize


def _view_bounds(mapping: ParamMapping, block_bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The bounds in the mapping's view of the part `block_bounds` of its block."""
    bounds = [(0, size) for size in mapping.view]
    for (low, high), group, size in zip(block_bounds, mapping.groups, mapping.block_shape, strict=True):
        if len(group) == 1:
            bounds[group[0]] = (low, high)
        elif (low, high) != (0, size):
            raise ValueError(f"{mapping.path} is interleaved in {mapping.name} along a dimension that devices divide")
    return bounds
