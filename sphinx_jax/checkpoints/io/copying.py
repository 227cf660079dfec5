"""Copying between differently ordered arrays, tile by tile, so that loading waits for the disk and not for this.

Left to itself, numpy transposes at a tenth of memory's speed, since each element it writes comes from another
cache line, and ml_dtypes widens bfloat16 one element at a time.
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
    """An uninitialised array at an address that XLA on CPU uses as it is instead of copying."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _XLA_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _XLA_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def copy(
    out: np.ndarray, source: np.ndarray, pool: Executor, copied: Callable[[int], None] = lambda elements: None
) -> None:
    """out[...] = source, whatever the order of either in memory; converts between floating-point types.

    The work is shared out over the pool's threads in bands that follow the source's order in memory.
    `copied` is called now and then with the number of elements done since the last call.
    """
    if source.size <= _SMALL_ELEMENTS:
        _convert(out, source)
        copied(source.size)
        return
    across, along = _fastest(out), _fastest(source)
    order = sorted(range(source.ndim), key=lambda dim: (dim == along, dim == across, -source.strides[dim]))
    out, source = out.transpose(order), source.transpose(order)
    copy_band = _convert if across == along else _transpose
    bands = _bands(source.shape)
    while some := list(itertools.islice(bands, _BANDS_AT_ONCE)):
        for _ in pool.map(lambda band: copy_band(out[band], source[band]), some):
            pass
        copied(sum(source[band].size for band in some))


def has_nan(array: np.ndarray) -> bool:
    """Whether a contiguous array of floating-point numbers has one that is not a number."""
    bits = _BITS[array.dtype.itemsize]
    infinity = np.array(np.inf, array.dtype).view(bits)
    magnitude = bits(np.iinfo(bits).max >> 1)
    flat = array.reshape(-1).view(bits)
    pieces = (flat[i : i + _CHECK_ELEMENTS] for i in range(0, flat.size, _CHECK_ELEMENTS))
    return any((piece & magnitude).max() > infinity for piece in pieces)


def _fastest(array: np.ndarray) -> int:
    """The dimension along which elements lie closest together."""
    return min((d for d in range(array.ndim) if array.shape[d] > 1), key=lambda d: abs(array.strides[d]))


def _bands(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover an array in order, each at most _BAND_ELEMENTS where its last dimension allows."""
    steps, inner = [], 1
    for size in reversed(shape):
        steps.append(max(1, min(size, _BAND_ELEMENTS // inner)))
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
    # Rows a power of two apart compete for the same few cache lines; a little padding keeps them out of
    # each other's way.
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
