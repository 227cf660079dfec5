"""Readers and writers of tensor files against torch and safetensors."""

import numpy as np
import pytest

from sphinx_jax.checkpoints.io import safetensors_files, torch_files

torch = pytest.importorskip("torch", reason="the reference: install the parity extra")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="the reference: install the parity extra")

DTYPES = ["bfloat16", "float16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64"]


def bits(tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    named = {f"of.{name}": (torch.randn(3, 5) * 4).to(getattr(torch, name)) for name in DTYPES}
    return named | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "large": torch.randn(300, 200)}


def assert_same(read: dict, expected: dict) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].shape == tuple(tensor.shape), name
        assert read[name].dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert np.ascontiguousarray(read[name]).tobytes() == bits(tensor), name


def test_reads_what_torch_saves(tensors, tmp_path):
    large = tensors["large"]
    tensors |= {"shared": large, "transposed": large.T, "part": large[7:9, ::3], "expanded": large[:1].expand(4, 200)}
    torch.save({"model": tensors, "epoch": 3, "args": {"lr": 1e-3}}, tmp_path / "a.pth")
    assert_same(torch_files.read(tmp_path / "a.pth").tensors, tensors)


def test_reads_a_state_dict_with_its_metadata(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict()
    torch.save(state, tmp_path / "a.pth")
    assert_same(torch_files.read(tmp_path / "a.pth").tensors, dict(state))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_we_write(tensors, tmp_path, mmap):
    torch.save(tensors, tmp_path / "theirs.pth")
    read = torch_files.read(tmp_path / "theirs.pth").tensors
    with torch_files.Writer(tmp_path / "ours.pth", {name: (t.shape, t.dtype) for name, t in read.items()}) as file:
        for name, tensor in read.items():
            file.write(name, [tensor])
    reloaded = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=mmap)["model"]
    assert list(reloaded) == list(tensors)
    for name, tensor in tensors.items():
        assert reloaded[name].dtype == tensor.dtype and reloaded[name].shape == tensor.shape
        assert bits(reloaded[name]) == bits(tensor)


def test_safetensors_round_trip(tensors, tmp_path):
    safetensors_torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    read = safetensors_files.read(tmp_path / "theirs.safetensors").tensors
    assert_same(read, tensors)
    shapes = {name: (t.shape, t.dtype) for name, t in read.items()}
    with safetensors_files.Writer(tmp_path / "ours.safetensors", shapes) as file:
        for name, tensor in read.items():
            file.write(name, [tensor])
    reloaded = safetensors_torch.load_file(tmp_path / "ours.safetensors")
    assert reloaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(reloaded[name], tensor), name
