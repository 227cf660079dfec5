"""Torch's zip-format `.pth` files without torch: tensors are views of the mapped file, and are written one at a time.

The pickle inside a file is a program. The unpickler here allows tensors and plain containers only: any other
name is an error before anything is called.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sphinx_jax.checkpoints.io.mapped_file import DTYPES, MappedFile
from sphinx_jax.errors import UserError

_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
}

# The exceptions that unpickling a damaged or hostile stream of allowed names can raise.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

_LOCAL_HEADER = 30
_ALIGNMENT = 64


def read(path: Path) -> MappedFile:
    """The tensors of a `.pth` file holding `{name: tensor}` or `{"model": {name: tensor}}`.

    Only the zip directory and the pickle are read; objects other than tensors are ignored. Raises UserError on a
    file that is not of this kind, is damaged, or requests code to be run.
    """
    file = MappedFile(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            roots = {name.split("/", 1)[0] for name in members if name.endswith("/data.pkl")}
            if len(roots) != 1:
                raise UserError(f"{path} is a zip file but not one that torch.save wrote: it has no single data.pkl")
            root = roots.pop()
            records = {
                name.removeprefix(f"{root}/data/"): _locate(file, info)
                for name, info in members.items()
                if name.startswith(f"{root}/data/")
            }
            start, size = _locate(file, members[f"{root}/data.pkl"])
            order = members.get(f"{root}/byteorder")
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"{path} is truncated or is not a zip-format torch file ({error}); download it again, or save it anew "
            "with torch 1.6 or later"
        ) from error
    if order is not None and file.read(*_span(_locate(file, order))) != b"little":
        raise UserError(f"{path} was written on a big-endian machine; save it anew on a little-endian one")
    state = _Unpickler(file, records, file.read(start, start + size)).run()
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if isinstance(state, dict):
        file.tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    if not file.tensors:
        raise UserError(f'{path} holds no tensors: expected {{name: tensor}} or {{"model": {{name: tensor}}}}')
    return file


def _span(record: tuple[int, int]) -> tuple[int, int]:
    return record[0], record[0] + record[1]


def _locate(file: MappedFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Offset and length of a member's bytes. Raises UserError if they are compressed, encrypted or missing."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UserError(f"{file.path}: {info.filename} is compressed or encrypted, which torch.save never does")
    header = file.read(info.header_offset, info.header_offset + _LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise UserError(f"{file.path} is damaged: {info.filename} is not where its directory says; download it again")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = info.header_offset + _LOCAL_HEADER + names
    if start + info.file_size > file.size:
        raise UserError(f"{file.path} is truncated: {info.filename} reaches past its end; download it again")
    return start, info.file_size


class _Storage(NamedTuple):
    dtype: np.dtype
    offset: int
    length: int


class _Unpickler(pickle.Unpickler):
    """Runs a pickle in which the only names are torch's tensor rebuilder, its storages and OrderedDict.

    The rebuilder is a bound method and a storage type a string: the pickle cannot modify either, nor call
    the latter.
    """

    def __init__(self, file: MappedFile, records: Mapping[str, tuple[int, int]], stream: bytes):
        super().__init__(io.BytesIO(stream))
        self._file = file
        self._records = records

    def run(self) -> Any:
        try:
            return self.load()
        except _PICKLE_ERRORS as error:
            raise UserError(
                f"{self._file.path} is damaged or unsafe: its pickle does not describe tensors ({error}); "
                "nothing in it was run"
            ) from error

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        if module == "torch" and name in _STORAGES:
            return name
        raise UserError(
            f"{self._file.path} is unsafe: it asks for {module}.{name}, and a checkpoint may hold only tensors "
            "and plain containers; nothing in it was run"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, length = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        dtype = DTYPES[_STORAGES[storage]]
        offset, size = self._records[key]
        if length * dtype.itemsize > size:
            raise pickle.UnpicklingError(f"data/{key} has {size} bytes and {length} elements of {dtype} are declared")
        return _Storage(dtype, offset, length)

    def _rebuild(
        self, storage: _Storage, start: int, shape: tuple, strides: tuple, requires_grad: bool, hooks: Any
    ) -> np.ndarray:
        reach = start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        if start < 0 or (0 not in shape and reach > storage.length):
            raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches past its storage")
        return self._file.view(storage.offset + start * storage.dtype.itemsize, storage.dtype, shape, strides)


class Writer:
    """Writes a `.pth` file of `{"model": {name: tensor}}` one tensor at a time, in the order of `tensors`.

    `torch.load(..., weights_only=True)` reads it. Use as a context manager.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self._root = path.name.removesuffix(".pth")
        self._file = path.open("wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._keys = {name: str(i) for i, name in enumerate(tensors)}
        self._add("data.pkl", _pickle(tensors, self._keys))
        self._add("byteorder", b"little")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._add("version", b"3\n")
        self._zip.close()
        self._file.close()

    def write(self, name: str, tensor: np.ndarray) -> None:
        self._add(f"data/{self._keys[name]}", np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    def _add(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        info.file_size = len(data)
        # As torch does, pad the header so that the data can be mapped aligned. zipfile adds 20 bytes of 64-bit
        # sizes to the header because of `force_zip64`.
        header = self._file.tell() + _LOCAL_HEADER + len(info.filename.encode()) + 20 + 4
        padding = -header % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._zip.open(info, "w", force_zip64=True) as member:
            member.write(data)


def _pickle(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], keys: Mapping[str, str]) -> bytes:
    """The pickle of `{"model": {name: tensor}}`, assembled by hand, since torch's names cannot be imported."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    def name_of(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    storages = {dtype: storage for storage, dtype in _STORAGES.items()}

    def tensor(key: str, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
        size = int(np.prod(shape, dtype=np.int64))
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
        storage = plain("storage") + name_of("torch", storages[dtype.name]) + plain(key) + plain("cpu") + plain(size)
        persistent = pickle.MARK + storage + pickle.TUPLE + pickle.BINPERSID
        no_hooks = name_of("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = persistent + plain(0) + plain(shape) + plain(strides) + pickle.NEWFALSE + no_hooks
        return name_of("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE

    items = b"".join(plain(name) + tensor(keys[name], *info) for name, info in tensors.items())
    model = pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + plain("model") + model + pickle.SETITEM + pickle.STOP
