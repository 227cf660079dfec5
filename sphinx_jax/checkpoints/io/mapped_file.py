"""One file of tensors, mapped into memory: tensors are views of it and use no memory until they are read."""

import mmap
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from sphinx_jax.checkpoints.io.placeholders import check_real_file, check_regular
from sphinx_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
    **{name: np.dtype(name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64")},
}

_PREFETCH_BYTES = 8 << 20


class MappedFile:
    """A file and the tensors found in it, by name. Raises UserError if it cannot be opened or is empty."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, np.ndarray] = {}
        check_regular(path)
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read {path}: {reason}; download it again, or make it readable") from error
        self._bytes = np.frombuffer(self._map, np.uint8)
        check_real_file(path, self.read(0, 1024))

    @property
    def size(self) -> int:
        return len(self._map)

    def read(self, start: int, stop: int) -> bytes:
        """A copy of some bytes, for headers."""
        return self._map[start:stop]

    def view(self, offset: int, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        """The array whose first element is `offset` bytes into the file; `strides` are in elements, 0 or more.

        Raises ValueError if it is not inside the file.
        """
        extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
        if min((offset, *shape, *strides)) < 0 or offset + extent * dtype.itemsize > self.size:
            raise ValueError("reaches past the end of the file")
        flat = self._bytes[offset : offset + extent * dtype.itemsize].view(dtype)
        return np.lib.stride_tricks.as_strided(flat, shape, [s * dtype.itemsize for s in strides], writeable=False)

    def prefetch(self, tensor: np.ndarray) -> None:
        """Read a view of this file into the page cache in large blocks, which page faults alone do not."""
        start = tensor.ctypes.data - self._bytes.ctypes.data
        if not 0 <= start < self.size:
            return
        scratch = bytearray(_PREFETCH_BYTES)
        with open(self.path, "rb", buffering=0) as file:
            for offset in range(start, start + tensor.nbytes, _PREFETCH_BYTES):
                length = min(_PREFETCH_BYTES, start + tensor.nbytes - offset)
                os.preadv(file.fileno(), [memoryview(scratch)[:length]], offset)

    def release(self) -> None:
        """Release the memory of the pages read so far; later reads map them again."""
        self._map.madvise(mmap.MADV_DONTNEED)
