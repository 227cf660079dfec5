"""Copies between differently ordered arrays, tile by tile, so that loading is bound by the disk.

Plain numpy transposes at a tenth of memory bandwidth, since each element it writes comes from another cache
line, and ml_dtypes converts bfloat16 one element at a time.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import ml_dtypes
import numpy as np

_TILE = 256
_PADDING = 24
_SMALL_ELEMENTS = 1 << 16
_BAND_ELEMENTS = 1 << 20
_BANDS_AT_ONCE = 32
_CHECK_ELEMENTS = 1 << 18
_XLA_ALIGNMENT = 64

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that XLA:CPU uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _XLA_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _XLA_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def ignore_progress(elements: int) -> None:
    """No progress report."""


def copy(
    out: np.ndarray, source: np.ndarray, pool: Executor, on_progress: Callable[[int], None] = ignore_progress
) -> None:
    """out[...] = source, for any memory order of either; converts between floating-point dtypes.

    The pool's threads copy bands that follow the source's memory order. `on_progress` is called with the number
    of elements copied since its last call.
    """
    if source.size <= _SMALL_ELEMENTS:
        _convert(out, source)
        on_progress(source.size)
        return
    out_dim, source_dim = _fastest_dim(out), _fastest_dim(source)
    order = sorted(range(source.ndim), key=lambda dim: (dim == source_dim, dim == out_dim, -source.strides[dim]))
    out, source = out.transpose(order), source.transpose(order)
    copy_band = _convert if out_dim == source_dim else _transpose
    bands = boxes(source.shape, _BAND_ELEMENTS)
    while batch := list(itertools.islice(bands, _BANDS_AT_ONCE)):
        for _ in pool.map(lambda band: copy_band(out[band], source[band]), batch):
            pass
        on_progress(sum(source[band].size for band in batch))


def has_nan(array: np.ndarray) -> bool:
    """Whether a contiguous array of floating-point numbers has one that is NaN."""
    bits = _BITS[array.dtype.itemsize]
    infinity = np.array(np.inf, array.dtype).view(bits)
    magnitude = bits(np.iinfo(bits).max >> 1)
    flat = array.reshape(-1).view(bits)
    chunks = (flat[i : i + _CHECK_ELEMENTS] for i in range(0, flat.size, _CHECK_ELEMENTS))
    return any((chunk & magnitude).max() > infinity for chunk in chunks)


def _fastest_dim(array: np.ndarray) -> int:
    """The dimension with the smallest stride."""
    return min((d for d in range(array.ndim) if array.shape[d] > 1), key=lambda d: abs(array.strides[d]))


def boxes(shape: tuple[int, ...], elements: int) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover an array in C order, each a contiguous run of at most `elements`."""
    steps, inner = [], 1
    for size in reversed(shape):
        steps.append(max(1, min(size, elements // inner)))
        inner *= size
    ranges = [range(0, size, step) for size, step in zip(shape, reversed(steps), strict=True)]
    for corner in itertools.product(*ranges):
        yield tuple(slice(start, start + r.step) for start, r in zip(corner, ranges, strict=True))


def _transpose(out: np.ndarray, source: np.ndarray) -> None:
    """out[...] = source, where source is contiguous along its last dimension and out along the one before."""
    *rest, rows, columns = source.shape
    corners = itertools.product(range(0, rows, _TILE), range(0, columns, _TILE))
    for lead, (row, column) in itertools.product(np.ndindex(*rest), list(corners)):
        tile = (*lead, slice(row, row + _TILE), slice(column, column + _TILE))
        _transpose_tile(out[tile], source[tile])


def _transpose_tile(out: np.ndarray, source: np.ndarray) -> None:
    # Rows at power-of-two strides map to the same few cache lines; padding avoids the conflicts.
    rows, columns = source.shape
    staged = np.empty((rows, columns + _PADDING), source.dtype)[:, :columns]
    _convert(staged, source)
    _convert(out, staged)


def _convert(out: np.ndarray, source: np.ndarray) -> None:
    """out[...] = source for arrays of one shape, bit by bit where the types are the same."""
    if out.dtype == source.dtype:
        bits = _BITS[out.itemsize]
        out.view(bits)[...] = source.view(bits)
    elif source.dtype == _BFLOAT16 and out.dtype == np.float32:
        wide = out.view(np.uint32)
        wide[...] = source.view(np.uint16)
        np.left_shift(wide, 16, out=wide)
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            out[...] = source
