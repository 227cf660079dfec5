"""Safetensors files: tensors are views of the mapped file, and are written one at a time.

The format (https://huggingface.co/docs/safetensors) is eight bytes of header length, a JSON header of
dtypes, shapes and offsets, then the data.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sphinx_jax.checkpoints.io.mapped_file import DTYPES, MappedFile
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


def read(path: Path) -> MappedFile:
    """The tensors of a safetensors file; only its header is read. Raises UserError if it is damaged."""
    file = MappedFile(path)
    data = 8 + int.from_bytes(file.read(0, 8), "little")
    try:
        if data > file.size:
            raise ValueError("the header is cut off")
        header = json.loads(file.read(8, data))
        header.pop("__metadata__", None)
        for name, info in header.items():
            shape, (start, stop) = tuple(info["shape"]), info["data_offsets"]
            dtype = DTYPES[_CODES[info["dtype"]]]
            if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
                raise ValueError(f"{name} of shape {shape} and {dtype} does not fill its bytes {start} to {stop}")
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            file.tensors[name] = file.view(data + start, dtype, shape, strides)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is truncated or is not a safetensors file ({error}); download it again") from error
    return file


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

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, tensor: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
