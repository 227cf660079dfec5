"""Safetensors files: tensors are views of the mapped file, and are written one at a time.

The format (https://huggingface.co/docs/safetensors) is eight bytes of header length, a JSON header of
dtypes, shapes and offsets, then the data.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sphinx_jax.checkpoints.io.mapped_file import DTYPES, MappedFile
from sphinx_jax.checkpoints.io.names import shorten
from sphinx_jax.errors import UserError

_CODES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}


# Of a header: 160,000 tensors' worth. Larger ones are no checkpoint of ours and fill memory when they are parsed.
_MAX_HEADER_BYTES = 1 << 24


def read(path: Path) -> MappedFile:
    """The tensors of a safetensors file; only its header is read. Raises UserError if it is damaged.

    As the format demands, the tensors fill the file after the header without gaps or overlaps.
    """
    file = MappedFile(path)
    data = 8 + int.from_bytes(file.read(0, 8), "little")
    try:
        if data > file.size:
            raise ValueError("the header is cut off")
        if data > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {data:,} bytes")
        header = json.loads(file.read(8, data), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        spans = []
        for name, info in header.items():
            shape, (start, stop) = tuple(info["shape"]), info["data_offsets"]
            if any(type(number) is not int for number in (*shape, start, stop)):
                raise ValueError(f"{shorten(name)} has sizes that are not integers")
            if info["dtype"] not in _CODES:
                raise UserError(
                    f"{path} holds {shorten(name)} as {info['dtype']!s:.20}, which is not supported: load a version of "
                    "the model in bfloat16, float16 or float32"
                )
            dtype = DTYPES[_CODES[info["dtype"]]]
            if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
                raise ValueError(f"{shorten(name)} of {dtype} does not fill its bytes {start} to {stop}")
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            file.tensors[name] = file.view(data + start, dtype, shape, strides)
            spans.append((start, stop, name))
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                raise ValueError(f"{shorten(name)} begins at {start}, not at {end} where the one before it ends")
            end = stop
        if data + end != file.size:
            raise ValueError(f"{file.size - data - end} bytes follow the last tensor")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is truncated or is not a safetensors file ({error}); download it again") from error
    return file


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a header. Raises ValueError if a name occurs twice, of which readers differ in what they read."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


class Writer:
    """Writes a safetensors file one tensor at a time, in the order of `tensors`. Use as a context manager."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        codes = {dtype: code for code, dtype in _CODES.items()}
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in tensors.items():
            size = math.prod(shape) * dtype.itemsize
            offsets = [offset, offset + size]
            header[name] = {"dtype": codes[dtype.name], "shape": list(shape), "data_offsets": offsets}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            self._file.close()

    def write(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        """Write the tensor whose consecutive parts in memory order are `chunks`."""
        for chunk in chunks:
            self._file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
