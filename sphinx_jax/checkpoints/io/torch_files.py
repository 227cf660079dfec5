"""Torch's zip-format `.pth` files without torch: tensors are views of the mapped file, and are written one at a time.

The pickle inside a file is a program. The unpickler here allows tensors and plain containers only: any other
name is an error before anything is called.
"""

import contextlib
import enum
import pickle
import pickletools
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sphinx_jax.checkpoints.io.mapped_file import DTYPES, MappedFile
from sphinx_jax.checkpoints.io.names import shorten
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

_IGNORED_OPCODES = frozenset(("PROTO", "FRAME"))
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES"),
    )
)
_MAX_DIMENSIONS = 32

# Of a pickle, and of a zip file's directory: 250,000 tensors' worth.
_MAX_PICKLE_BYTES = 1 << 26

_LOCAL_HEADER = 30
_ALIGNMENT = 64


def read(path: Path) -> MappedFile:
    """The tensors of a `.pth` file holding `{name: tensor}` or `{"model": {name: tensor}}`.

    Only the zip directory and the pickle are read; objects other than tensors are ignored. Raises UserError on a
    file that is not of this kind, is damaged, or requests code to be run.
    """
    file = MappedFile(path)
    _check_zip_directory(file)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise UserError(
                    f"{path} holds a member twice, of which readers differ in what they read; download it again"
                )
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
            if size > _MAX_PICKLE_BYTES:
                raise UserError(f"{path} has a pickle of {size:,} bytes, too many for a checkpoint; download it again")
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


def _check_zip_directory(file: MappedFile) -> None:
    """Raises UserError if the zip file's directory, which is read at once, is larger than any checkpoint's."""
    tail_start = max(0, file.size - (1 << 16) - 22)
    tail = file.read(tail_start, file.size)
    end = tail.rfind(b"PK\x05\x06")
    sizes = [int.from_bytes(tail[end + 12 : end + 16], "little")] if end >= 0 else []
    locator = tail.rfind(b"PK\x06\x07")
    if locator >= 0:
        at = int.from_bytes(tail[locator + 8 : locator + 16], "little")
        sizes.append(int.from_bytes(file.read(at + 40, at + 48), "little"))
        sizes = [size for size in sizes if size != 0xFFFFFFFF]
    if any(size > _MAX_PICKLE_BYTES for size in sizes):
        raise UserError(f"{file.path} has a directory too large for a checkpoint; download it again")


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


class _Function(enum.Enum):
    """What a pickle may call."""

    REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
    ORDERED_DICT = ("collections", "OrderedDict")


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Unpickler:
    """Interprets the opcodes of a pickle of tensors and plain containers.

    It is not Python's own: nothing is imported, hashed or compared that a file made up, each opcode takes constant
    time, and memory is bounded by the size of the stream. Keys of dicts are texts or numbers. A name other than those
    of `_Function` and of torch's storages, and any other opcode, is an error before anything is called.
    """

    def __init__(self, file: MappedFile, records: Mapping[str, tuple[int, int]], stream: bytes):
        self._file, self._records, self._stream = file, records, stream
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle describes. Raises UserError if it is damaged or asks for anything else."""
        try:
            for opcode, argument, _ in pickletools.genops(self._stream):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except _PICKLE_ERRORS as error:
            raise UserError(
                f"{self._file.path} is damaged or unsafe: its pickle does not describe tensors ({error!s:.200}); "
                "nothing in it was run"
            ) from error
        raise UserError(f"{self._file.path} is damaged: its pickle has no end; download it again")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _IGNORED_OPCODES:
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name in ("TUPLE", "LIST"):
            items = self._pop_to_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            _set_items(self._top(dict), items[::2], items[1::2])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "POP":
            stack.pop()
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(self._find(module, attribute))
        elif name == "STACK_GLOBAL":
            stack.append(self._find(*self._pop(2)))
        elif name == "BINPERSID":
            stack.append(self._load_storage(stack.pop()))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            # The metadata of a state dict: versions of modules.
            (state,) = self._pop(1)
            if type(self._top(dict)) is not type(state):
                raise pickle.UnpicklingError("an object with a state of its own")
        else:
            raise pickle.UnpicklingError(f"opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise pickle.UnpicklingError("an empty stack")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise pickle.UnpicklingError(f"{type(self._stack[-1]).__name__} in place of {kind.__name__}")
        return self._stack[-1]

    def _find(self, module: Any, name: Any) -> "_Function | _StorageType":
        if module == "torch" and isinstance(name, str) and name in _STORAGES:
            return _StorageType(DTYPES[_STORAGES[name]])
        for function in _Function:
            if (module, name) == function.value:
                return function
        shown = f"{shorten(str(module))}.{shorten(str(name))}" if isinstance(module, str) else "an object"
        raise UserError(
            f"{self._file.path} is unsafe: it asks for {shown}, and a checkpoint may hold only tensors "
            "and plain containers; nothing in it was run"
        )

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call without arguments")
        if function is _Function.REBUILD_TENSOR:
            return self._rebuild(*arguments)
        if function is _Function.ORDERED_DICT:
            values: dict[Any, Any] = {}
            for pairs in arguments:
                for key, value in pairs:
                    _set_items(values, [key], [value])
            return values
        raise pickle.UnpicklingError("a call of something that is no function")

    def _load_storage(self, identifier: Any) -> _Storage:
        kind, storage, key, _, length = identifier
        if not (kind == "storage" and isinstance(storage, _StorageType) and isinstance(key, str)):
            raise pickle.UnpicklingError("an unknown persistent object")
        if type(length) is not int or length < 0:
            raise pickle.UnpicklingError(f"the length of data/{shorten(key)}")
        offset, size = self._records[key]
        if length * storage.dtype.itemsize > size:
            raise pickle.UnpicklingError(
                f"data/{shorten(key)} has {size} bytes and {length} elements of {storage.dtype} are declared"
            )
        return _Storage(storage.dtype, offset, length)

    def _rebuild(self, storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        if not isinstance(storage, _Storage) or not (isinstance(shape, tuple) and isinstance(strides, tuple)):
            raise pickle.UnpicklingError("a tensor without storage, shape or strides")
        if len(shape) > _MAX_DIMENSIONS or any(type(number) is not int for number in (start, *shape, *strides)):
            raise pickle.UnpicklingError("a tensor's shape")
        reach = start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        if start < 0 or (0 not in shape and reach > storage.length):
            raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches past its storage")
        return self._file.view(storage.offset + start * storage.dtype.itemsize, storage.dtype, shape, strides)


def _set_items(values: dict[Any, Any], keys: list[Any], items: list[Any]) -> None:
    """Raises UnpicklingError on a key that could take forever to hash."""
    for key, item in zip(keys, items, strict=True):
        if key is not None and type(key) not in (str, int, float, bool, bytes):
            raise pickle.UnpicklingError(f"a key that is {type(key).__name__}")
        values[key] = item


class Writer:
    """Writes a `.pth` file of `{"model": {name: tensor}}` one tensor at a time, in the order of `tensors`.

    `torch.load(..., weights_only=True)` reads it. Use as a context manager.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self._root = path.name.removesuffix(".pth")
        self._file = path.open("wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._keys = {name: str(i) for i, name in enumerate(tensors)}
        self._add("data.pkl", [_pickle(tensors, self._keys)])
        self._add("byteorder", [b"little"])

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._add("version", [b"3\n"])
                self._zip.close()
        finally:
            # A file that is not complete gets no directory, not even from the archive's destructor.
            self._zip.fp = None
            with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
                self._file.close()

    def write(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        """Write the tensor whose consecutive parts in memory order are `chunks`."""
        parts = (np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data for chunk in chunks)
        self._add(f"data/{self._keys[name]}", parts)

    def _add(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        # As torch does, pad the header so that the data can be mapped aligned. zipfile adds 20 bytes of 64-bit
        # sizes to the header because of `force_zip64`.
        header = self._file.tell() + _LOCAL_HEADER + len(info.filename.encode()) + 20 + 4
        padding = -header % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._zip.open(info, "w", force_zip64=True) as member:
            for part in parts:
                member.write(part)


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
