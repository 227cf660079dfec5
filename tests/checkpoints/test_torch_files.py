"""The unpickler reads tensors and executes nothing; damage is one error."""

import importlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from sphinx_jax.checkpoints.io import torch_files
from sphinx_jax.errors import UserError

STORED = zipfile.ZIP_STORED


def write_zip(path, members: dict[str, bytes], compression: int = STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def tensor_pickle(shape=(2, 3), strides=(3, 1), offset=0, length=6, storage=b"FloatStorage", key="0") -> bytes:
    """The opcodes that torch writes for {"x": tensor} on a storage of `length` elements."""

    def plain(value) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    pid = b"(" + plain("storage") + b"ctorch\n" + storage + b"\n" + plain(key) + plain("cpu") + plain(length) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + pid + plain(offset) + plain(shape) + plain(strides) + b"\x89" + hooks + b"t"
    return b"\x80\x02}" + plain("x") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


DATA = np.arange(6, dtype=np.float32)


def test_golden_files_match_torchs_listing(golden_checkpoint, golden_text):
    listed, name = {}, None
    for line in golden_text("keys.txt").splitlines():
        if line.startswith("== ") and "is a link" not in line:
            name = line.split()[1].split("/", 1)[1]
            listed[name] = {}
        elif not line.startswith("=="):
            tensor, shape, dtype = line.split("\t")
            listed[name][tensor] = (json.loads(shape), dtype.removeprefix("torch."))
    assert len(listed) == 3
    for name, tensors in listed.items():
        file = torch_files.read(golden_checkpoint("ens", int(name[2])) / name.split("/")[1])
        assert {k: (list(t.shape), t.dtype.name) for k, t in file.tensors.items()} == tensors


def test_golden_values_are_the_bytes_of_the_archive(golden_checkpoint):
    path = golden_checkpoint("ens", 1) / "consolidated.00-of-01.model.pth"
    tensors = list(torch_files.read(path).tensors.values())
    with zipfile.ZipFile(path) as archive:
        for i in range(0, len(tensors), 10):
            assert tensors[i].tobytes() == archive.read(f"consolidated.00-of-01.model/data/{i}")


def test_strides_and_offsets(tmp_path):
    pickled = tensor_pickle(shape=(2, 2), strides=(1, 3), offset=1)
    file = torch_files.read(write_zip(tmp_path / "a.pth", {"data.pkl": pickled, "data/0": DATA.tobytes()}))
    assert file.tensors["x"].tolist() == [[1, 4], [2, 5]]


@pytest.mark.parametrize(
    "attack",
    [
        lambda marker: Call(os.system, f"touch {marker}"),
        lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
        lambda marker: Call(importlib.import_module, "os"),
        lambda marker: Call(os.mkdir, str(marker)),
        lambda marker: OrderedDict(x=[Call(os.mkdir, str(marker))]),
        lambda marker: {"model": {"x": np.zeros(3)}},
        lambda marker: io.StringIO("x"),
    ],
    ids=["os.system", "eval", "import", "os.mkdir", "nested", "numpy", "object"],
)
def test_hostile_pickles_run_nothing(tmp_path, attack):
    marker = tmp_path / "was-here"
    for protocol in range(2, 6):
        path = write_zip(tmp_path / "a.pth", {"data.pkl": pickle.dumps(attack(marker), protocol)})
        with pytest.raises(UserError, match=r"unsafe.*nothing in it was run"):
            torch_files.read(path)
    assert not marker.exists()


def test_allowed_names_cannot_be_modified_or_called_with_other_arguments(tmp_path):
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"ctorch\nFloatStorage\n"
    state = pickle.dumps((None, {"__defaults__": (1,), "dtype": "float16"}), 2)[2:-1]
    container = b"ccollections\nOrderedDict\n"
    for opcodes in (rebuild + state + b"b.", storage + state + b"b.", container + state + b"b.", storage + b")R."):
        with pytest.raises(UserError, match="nothing in it was run"):
            torch_files.read(write_zip(tmp_path / "a.pth", {"data.pkl": b"\x80\x02" + opcodes}))


@pytest.mark.parametrize(
    "pickled",
    [
        tensor_pickle(length=7),
        tensor_pickle(shape=(3, 3), strides=(3, 1)),
        tensor_pickle(offset=1),
        tensor_pickle(offset=-1),
        tensor_pickle(strides=(-3, 1)),
        tensor_pickle(shape=(-1, 3)),
        tensor_pickle(shape=(2**62, 3), strides=(2**62, 1)),
        tensor_pickle(shape=(2,)),
        tensor_pickle(shape=("a", "b")),
        tensor_pickle(key="1"),
        tensor_pickle(storage=b"QUInt8Storage"),
        tensor_pickle()[:-20],
        b"",
        b"\x80\x02" + b"(" * 50,
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        pickle.dumps([1, 2]),
        pickle.dumps({"model": {"x": 1}}),
    ],
)
def test_pickles_that_do_not_describe_tensors(tmp_path, pickled):
    with pytest.raises(UserError, match=r"a\.pth"):
        torch_files.read(write_zip(tmp_path / "a.pth", {"data.pkl": pickled, "data/0": DATA.tobytes()}))


@pytest.mark.parametrize("fraction", [0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_file(tmp_path, golden_checkpoint, fraction):
    file_bytes = (golden_checkpoint("ens", 1) / "consolidated.00-of-01.model.pth").read_bytes()
    path = tmp_path / "a.pth"
    path.write_bytes(file_bytes[: int(len(file_bytes) * fraction)])
    with pytest.raises(UserError, match=r"a\.pth"):
        torch_files.read(path)


def test_other_files(tmp_path):
    path = tmp_path / "a.pth"
    members = {"data.pkl": tensor_pickle(), "data/0": DATA.tobytes()}
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(UserError, match="not a zip-format torch file"):
        torch_files.read(path)
    with pytest.raises(UserError, match="no single data"):
        torch_files.read(write_zip(path, {"readme": b"hello"}))
    with pytest.raises(UserError, match="compressed"):
        torch_files.read(write_zip(path, members, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="big-endian"):
        torch_files.read(write_zip(path, members | {"byteorder": b"big"}))
    with pytest.raises(UserError, match="cannot read"):
        torch_files.read(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="cannot read"):
        torch_files.read(tmp_path)


def test_zip_directory_that_points_outside_the_file(tmp_path):
    path = write_zip(tmp_path / "a.pth", {"data.pkl": tensor_pickle(), "data/0": DATA.tobytes()})
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 42 : central + 46] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.pth"):
        torch_files.read(path)


def test_written_file_is_aligned_and_reads_back(tmp_path):
    tensors = {f"layer.{i}": np.full((i, 3), i, np.float16) for i in range(1, 5)} | {
        "scalar": np.full((), 2, np.float32)
    }
    path = tmp_path / "a.pth"
    with torch_files.Writer(path, {name: (t.shape, t.dtype) for name, t in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.write(name, [tensor])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    read = torch_files.read(path).tensors
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(read[name], tensor)
        assert read[name].ctypes.data % 64 == 0
