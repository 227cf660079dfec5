"""Hostile and damaged files: one UserError each, in bounded memory and time; nothing is executed."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import sharding
from sphinx_jax import UserError, checkpoints
from sphinx_jax.checkpoints.formats import mixtral
from sphinx_jax.checkpoints.io import safetensors_files, torch_files
from tests.checkpoints.test_torch_files import DATA, tensor_pickle, write_zip
from tests.instruments.small_disk import small_disk

ROOT = Path(__file__).parents[2]


def write_safetensors(path, header: str | dict, data: bytes):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(start: int, stop: int) -> dict:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]}


@pytest.fixture
def directory(accessory_directory, tmp_path):
    source = checkpoints.load(accessory_directory(), sharding.make_mesh())
    path = tmp_path / "hf"
    mixtral.save(path, source.config, source.params, None, 3)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"x": TENSOR, "x": TENSOR}'.replace("TENSOR", json.dumps(tensor(0, 8))), "occurs twice"),
        ({"x": tensor(0, 8), "y": tensor(4, 8)}, "y begins at 4, not at 8"),
        ({"x": tensor(0, 4)}, "4 bytes follow the last tensor"),
        ({"x": tensor(4, 8)}, "x begins at 4, not at 0"),
        ({"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "not integers"),
        ({"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "not integers"),
        ({"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "not a safetensors file"),
        ({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, "x as F8_E4M3, which is not supported"),
        ('{"x": ' + "1" * 5000 + "}", "not a safetensors file"),
        ("[" * 100_000, "not a safetensors file"),
    ],
    ids=["twice", "overlap", "trailing", "gap", "float", "bool", "list", "float8", "digits", "nested"],
)
def test_safetensors_that_safetensors_refuses(tmp_path, header, message):
    path = write_safetensors(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(UserError, match=message):
        safetensors_files.read(path)


def test_giant_header_in_a_sparse_file(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((1 << 32).to_bytes(8, "little"))
        file.truncate(8 + (1 << 32))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match="header has 4,294,967,304 bytes"):
        safetensors_files.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert time.monotonic() - start < 1


def test_giant_directory_in_a_sparse_zip(tmp_path):
    path = tmp_path / "a.pth"
    size = (1 << 32) - 64
    end = b"PK\x05\x06" + bytes(4) + (1).to_bytes(2, "little") * 2 + size.to_bytes(4, "little") + bytes(6)
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(end)
    with pytest.raises(UserError, match="directory too large"):
        torch_files.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_a_member_twice(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for data in (DATA, -DATA):
            archive.writestr("archive/data/0", data.tobytes())
        archive.writestr("archive/data.pkl", tensor_pickle())
    with pytest.raises(UserError, match="holds a member twice"):
        torch_files.read(path)


def nested_tuples(depth: int) -> bytes:
    """A tuple of a tuple twice, and so on: 2^depth leaves to hash, compare or print, from few bytes."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


BOMB = nested_tuples(100)


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02Nr\x80\xc3\xc9\x01.",
        b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.",
        b"\x80\x02}" + BOMB + b"Ns.",
        b"\x80\x02ccollections\nOrderedDict\n(]" + BOMB + b"N\x86atR.",
        b"\x80\x04\x8f(" + BOMB + b"\x90.",
        b"\x80\x04(" + BOMB + b"\x91.",
        b"\x80\x02" + BOMB + b"Q.",
        b"\x80\x02(" + BOMB + b"NNNNtQ.",
        b"\x80\x02(" + pickle.dumps("storage", 2)[2:-1] + b"ctorch\nFloatStorage\n" + BOMB + b"NNtQ.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00" + BOMB + BOMB + b"NNtR.",
        b"\x80\x02" + BOMB + b"\x93.",
        b"\x80\x02" + BOMB + b"N\x93.",
        b"\x80\x02N(((((tttttt.",
        b"\x80\x02h\x05.",
        b"\x80\x02e.",
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02N",
    ],
)
def test_pickle_bombs(tmp_path, stream):
    path = write_zip(tmp_path / "a.pth", {"data.pkl": stream, "data/0": DATA.tobytes()})
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=r"a\.pth") as caught:
        torch_files.read(path)
    assert len(str(caught.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert time.monotonic() - start < 2


def test_names_of_5000_letters(directory):
    index = directory / "model.safetensors.index.json"
    for name in ("x" * 5000, "x" * 5000 + "/y", "a\0b", "..", "/etc/passwd", "", "é" * 200):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(UserError, match="lacks") as caught:
            checkpoints.open(directory)
        assert len(str(caught.value)) < 1000 and "\0" not in str(caught.value)


def test_tensors_with_names_of_5000_letters(directory):
    write_safetensors(directory / "model.safetensors", {"\x1b[2J" + "x" * 5000: tensor(0, 8)}, bytes(8))
    with pytest.raises(UserError, match="is unexpected") as caught:
        checkpoints.load(directory, sharding.make_mesh())
    assert "\x1b" not in str(caught.value)
    assert max(map(len, str(caught.value).split("; "))) < 500


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "config.json", "model.safetensors.index.json"])
def test_pipe_in_place_of_a_file(directory, name):
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(UserError, match="not a regular file"):
        checkpoints.open(directory)


def test_pipe_as_single_file_of_weights(directory):
    os.mkfifo(directory / "model.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        checkpoints.open(directory)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"git-lfs pointer.*`git lfs pull` in"),
        (b"\n<!DOCTYPE html>\n<html></html>", "web page, not the file itself: log in"),
    ],
    ids=["lfs", "html"],
)
@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "model.safetensors.index.json"])
def test_placeholders_in_place_of_files(directory, name, data, message):
    (directory / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        checkpoints.open(directory)


def test_placeholders_in_place_of_torch_files(accessory_directory):
    path = accessory_directory()
    (path / "consolidated.00-of-01.model.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        checkpoints.open(path)


def test_dangling_links_of_a_cache(directory):
    for name in ("model-00002-of-00003.safetensors", "model.safetensors"):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to("../../blobs/0123")
        with pytest.raises(UserError, match=rf"{re.escape(name)} is a link to ../../blobs/0123, which is missing"):
            checkpoints.open(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "adapters of PEFT, and lacks their adapter_config.json"),
        ("model-q4.gguf", "a model of llama.cpp"),
        ("flax_model.msgpack", "another framework"),
        ("model-00001-of-00019.safetensors", "lacks the index"),
    ],
)
def test_recognised_files_that_are_not_read(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"holds {re.escape(name)}, .*{message}"):
        checkpoints.open(tmp_path)


def test_numbered_consolidated_files(mistral_directory, weights, ours, same):
    path = mistral_directory("experts", "safetensors", 1)
    tensors = safetensors_files.read(path / "consolidated.safetensors").tensors
    names = list(tensors)
    for i in range(3):
        part = {name: tensors[name] for name in names[i::3]}
        file = path / f"consolidated-0000{i + 1}-of-00003.safetensors"
        with safetensors_files.Writer(file, {name: (t.shape, t.dtype) for name, t in part.items()}) as writer:
            for name, array in part.items():
                writer.write(name, [np.asarray(array)])
    (path / "consolidated.safetensors").unlink()
    same(checkpoints.load(path, sharding.make_mesh()).params, ours(weights(), unstacked=True))
    (path / "consolidated-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks consolidated-00002-of-00003\.safetensors; download every file"):
        checkpoints.open(path)


@pytest.mark.parametrize("files", [1, 3])
def test_pytorch_model_bin(directory, hugging_face_tensors, weights, ours, same, files):
    tensors = hugging_face_tensors(weights())
    for file in directory.glob("model*"):
        file.unlink()
    weight_map = {}
    for i in range(files):
        part = {name: tensors[name] for name in list(tensors)[i::files]}
        name = "pytorch_model.bin" if files == 1 else f"pytorch_model-0000{i + 1}-of-0000{files}.bin"
        weight_map |= dict.fromkeys(part, name)
        with torch_files.Writer(directory / name, {key: (t.shape, t.dtype) for key, t in part.items()}) as writer:
            for key, array in part.items():
                writer.write(key, [array])
    if files > 1:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    same(checkpoints.load(directory, sharding.make_mesh()).params, ours(weights(), unstacked=True))


# Destinations


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_destination_under_a_file(accessory_directory, tmp_path, format):
    source = accessory_directory()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"file is a file; choose another directory|Not a directory"):
        checkpoints.convert(source, tmp_path / "file" / "deep" / "out", format)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_destination_that_is_no_name(accessory_directory, tmp_path, name):
    with pytest.raises(UserError, match="cannot write"):
        checkpoints.convert(accessory_directory(), tmp_path / name, "mixtral")


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "512k") as path:
        yield path


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_full_disk(accessory_directory, disk, format):
    with pytest.raises(UserError, match=r"cannot write .*No space left on device; free some space") as caught:
        checkpoints.convert(accessory_directory(), disk / "deep" / "out", format, dtype="float32")
    assert "\n" not in str(caught.value)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_read_only_disk(accessory_directory, disk, format):
    remount = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
    if remount.returncode:
        pytest.skip("remounting read-only is not allowed here")
    with pytest.raises(UserError, match=r"cannot write .*(not writable|Read-only file system)"):
        checkpoints.convert(accessory_directory(), disk / "out", format)


PROGRAM = """
import sys, time
from sphinx_jax.checkpoints import writer
from sphinx_jax.cli import common, convert

def slow(*_):
    print("writing", flush=True)
    time.sleep(60)

writer.copy = slow
sys.exit(common.run(convert.main, sys.argv[1:]))
"""


def test_sigterm_leaves_nothing(accessory_directory, tmp_path):
    source, out = accessory_directory(), tmp_path / "deep" / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", PROGRAM, str(source), str(out), "--format", "mixtral"]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert list(out.parent.iterdir())
    process.terminate()
    assert process.wait(timeout=60) != 0
    assert not out.parent.exists()
