"""Mixtral directories of Hugging Face and of Mistral, read and written."""

import json
import re

import numpy as np
import pytest

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.formats import mixtral
from sphinx_jax.checkpoints.io import safetensors_files
from sphinx_jax.errors import UserError


@pytest.mark.parametrize(
    ("style", "suffix", "files"),
    [("experts", "pth", 1), ("block_sparse", "pt", 8), ("experts", "safetensors", 1)],
)
def test_mistrals_consolidated_files(mistral_directory, weights, ours, same, config, style, suffix, files):
    loaded = checkpoints.load(mistral_directory(style, suffix, files), sharding.make_mesh(expert=4))
    assert loaded.config == config
    assert loaded.tokenizer_bytes is None
    same(loaded.params, ours(weights(), unstacked=True))


@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_round_trip(
    accessory_directory, weights, ours, same, hugging_face_tensors, config, mesh, tmp_path, shards
):
    source = checkpoints.load(accessory_directory(), mesh)
    path = tmp_path / "hf"
    mixtral.save(path, source.config, source.params, b"a tokenizer", shards)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == shards
    written = {name: t for file in files for name, t in safetensors_files.read(file).tensors.items()}
    expected = hugging_face_tensors(weights())
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].tobytes() == tensor.tobytes(), name
    loaded = checkpoints.load(path, mesh, unstacked=False)
    assert (loaded.config, loaded.tokenizer_bytes) == (config, b"a tokenizer")
    same(loaded.params, ours(weights(), unstacked=False))


@pytest.fixture
def directory(accessory_directory, tmp_path):
    source = checkpoints.load(accessory_directory(), sharding.make_mesh())
    path = tmp_path / "hf"
    mixtral.save(path, source.config, source.params, None, 3)
    return path


def _error(path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoints.load(path, sharding.make_mesh())
    return str(caught.value)


def test_index_that_names_a_missing_file_or_one_outside(directory):
    index = directory / "model.safetensors.index.json"
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "lacks model-00002-of-00003.safetensors" in _error(directory)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    assert "../secret.safetensors" in _error(directory)
    index.write_text("{}")
    assert "weight_map" in _error(directory)


def test_truncated_file(directory):
    file = directory / "model-00001-of-00003.safetensors"
    file_bytes = file.read_bytes()
    for length in (0, 7, 100, len(file_bytes) - 1):
        file.write_bytes(file_bytes[:length])
        assert file.name in _error(directory)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 8]}},
        {"x": 1},
        [1],
    ],
)
def test_inconsistent_header(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(UserError, match="not a safetensors file"):
        safetensors_files.read(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "only 'mixtral'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": "all"}, "'sliding_window' must be an integer"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 8}, r"q_proj\.weight has shape \(64, 64\), not \(128, 64\)"),
        ({"head_dim": 3}, "inconsistent"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": 2.0}, "rope_scaling"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"num_local_experts": 4}, r"experts\.7\.w1\.weight is unexpected"),
        ({"intermediate_size": 64}, r"w2\.weight has shape \(64, 48\), not \(64, 64\)"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
    ],
)
def test_wrong_config(directory, change, message):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert re.search(message, _error(directory))


def test_two_files_that_hold_one_tensor(mistral_directory):
    path = mistral_directory("experts", "pth", 2)
    (path / "consolidated.02.pth").write_bytes((path / "consolidated.01.pth").read_bytes())
    assert "another file of the set holds too" in _error(path)


def test_nans(directory):
    file = directory / "model-00002-of-00003.safetensors"
    name, tensor = next((n, t) for n, t in safetensors_files.read(file).tensors.items() if t.ndim == 2)
    data = bytearray(file.read_bytes())
    at = data.index(np.ascontiguousarray(tensor).tobytes())
    data[at : at + 2] = np.array([0x7FC0], "<u2").tobytes()
    file.write_bytes(data)
    assert f"{name} holds NaNs" in _error(directory)
