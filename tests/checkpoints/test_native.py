"""Native checkpoints: any mesh to any other, stacked to unstacked and back, in either dtype; damage is reported."""

import json
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import loaded_model
from sphinx_jax.checkpoints.formats import native
from sphinx_jax.errors import UserError


def put(tree, mesh, config, unstacked):
    """A numpy tree, sharded on the mesh as the model is."""
    _, abstract = loaded_model.abstract_model(config, mesh, None, unstacked)
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, abstract)


MESHES = [{}, {"tensor": 2}, {"expert": 2, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2}, {}]


def test_from_mesh_to_mesh_and_back(weights, ours, same, config, tmp_path):
    """1, 2, 4 and 8 devices and back, each writing for the next; stacked and unstacked alternately."""
    expected = {unstacked: ours(weights(dtype=np.dtype("float32")), unstacked) for unstacked in (False, True)}
    params = put(expected[False], sharding.make_mesh(), config, False)
    for i, shape in enumerate(MESHES):
        native.save(tmp_path / str(i), config, params, b"a tokenizer")
        loaded = native.load(tmp_path / str(i), sharding.make_mesh(**shape), unstacked=i % 3 != 0)
        assert (loaded.config, loaded.tokenizer_bytes) == (config, b"a tokenizer")
        assert dict(loaded.mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | shape
        same(loaded.params, expected[i % 3 != 0])
        params = loaded.params


@pytest.mark.parametrize("stacked", [False, True])
def test_every_mesh_stacked_and_unstacked_in_both_dtypes(weights, ours, same, config, tmp_path, mesh, stacked):
    exact = ours(weights(), not stacked)
    path = tmp_path / "native"
    native.save(path, config, put(exact, sharding.make_mesh(tensor=2, fsdp=2), config, not stacked), b"a tokenizer")
    assert json.loads((path / "config.json").read_text())["stacked"] is stacked
    for unstacked in (False, True):
        same(native.load(path, mesh, unstacked=unstacked).params, ours(weights(), unstacked))
    wide = native.load(path, mesh, "float32", unstacked=False)
    same(wide.params, jax.tree.map(lambda x: x.astype(np.float32), ours(weights(), False)))
    _, abstract = loaded_model.abstract_model(config, mesh, None, False)
    assert sharding.shardings_of(wide.params) == sharding.shardings_of(abstract)


def test_float32_is_rounded_to_bfloat16(weights, ours, same, config, tmp_path):
    exact = ours(weights(dtype=np.dtype("float32")), True)
    native.save(tmp_path / "n", config, put(exact, sharding.make_mesh(), config, True), b"")
    loaded = native.load(tmp_path / "n", sharding.make_mesh(tensor=2), "bfloat16")
    rounded = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, jax.numpy.bfloat16)), exact)
    same(loaded.params, rounded)


def test_orbax_alone_can_read_it(weights, ours, same, config, tmp_path):
    exact = ours(weights(), False)
    native.save(tmp_path / "n", config, put(exact, sharding.make_mesh(tensor=4), config, False), b"")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(tmp_path / "n" / "params")
    same(restored, exact)


def test_orbax_alone_can_read_a_converted_one(accessory_directory, weights, ours, same, tmp_path):
    checkpoints.convert(accessory_directory(), tmp_path / "n", "native")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(tmp_path / "n" / "params")
    layers = restored["language"]["layers"]
    restored["language"]["layers"] = {int(i): layer for i, layer in layers.items()}
    same(restored, ours(weights(), True))


def test_published_to_native_and_back(golden_checkpoint, same, tmp_path):
    published = checkpoints.load(golden_checkpoint("ens", 2), sharding.make_mesh())
    native.save(tmp_path / "n", published.config, published.params, published.tokenizer_bytes)
    back = checkpoints.load(tmp_path / "n", sharding.make_mesh(tensor=2, expert=2, fsdp=2))
    assert back.config == published.config
    assert back.tokenizer_bytes == published.tokenizer_bytes
    same(back.params, published.params)


@pytest.fixture
def saved(weights, ours, config, tmp_path):
    path = tmp_path / "native"
    native.save(path, config, put(ours(weights(), False), sharding.make_mesh(tensor=2), config, False), b"a tokenizer")
    return path


def test_saving_over_something(saved, weights, ours, same, config):
    params = put(ours(weights(1), True), sharding.make_mesh(), config, True)
    with pytest.raises(UserError, match="exists already"):
        native.save(saved, config, params, b"new")
    assert native.load(saved, sharding.make_mesh()).tokenizer_bytes == b"a tokenizer"
    native.save(saved, config, params, b"new", overwrite=True)
    loaded = native.load(saved, sharding.make_mesh())
    assert loaded.tokenizer_bytes == b"new"
    same(loaded.params, ours(weights(1), True))
    assert [file.name for file in saved.parent.iterdir()] == ["native"]


def test_saving_over_a_file(saved, weights, ours, config, tmp_path):
    (tmp_path / "file").write_text("precious")
    params = put(ours(weights(), True), sharding.make_mesh(), config, True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists already"):
            native.save(tmp_path / "file", config, params, b"", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "precious"


def test_failed_save_leaves_nothing(tmp_path, config):
    params = {"language": {"layers": {"x": jax.numpy.zeros((1, 1))}}}
    with pytest.raises(UserError, match="cannot write"):
        native.save(tmp_path / "n", config, params, {"no-such-directory/tokenizer.model": b""})
    assert list(tmp_path.iterdir()) == []


def _error(path) -> str:
    before = len(jax.live_arrays())
    with pytest.raises(UserError) as caught:
        checkpoints.load(path, sharding.make_mesh())
    message = str(caught.value)
    caught = None
    assert len(jax.live_arrays()) == before
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "params", "params/manifest.ocdbt"])
def test_missing_files(saved, name):
    removed = saved / name
    shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
    if name == "config.json":
        assert "no config.json" in _error(saved)
    else:
        assert f"{name.split('/')[0]} is " in _error(saved)


@pytest.mark.parametrize("fraction", [None, 0, 0.5, 0.9])
def test_truncated_data(saved, fraction):
    """Missing data is not read as zeros."""
    data = max((file for file in (saved / "params").rglob("d/*")), key=lambda file: file.stat().st_size)
    data_bytes = data.read_bytes()
    data.unlink()
    if fraction is not None:
        data.write_bytes(data_bytes[: int(len(data_bytes) * fraction)])
    assert re.search(r"language\.\S+ in \S+/params is damaged", _error(saved))


@pytest.mark.parametrize("fraction", [0, 0.5, 0.99])
def test_truncated_array_index(saved, fraction):
    file = saved / "params" / "manifest.ocdbt"
    data_bytes = file.read_bytes()
    file.write_bytes(data_bytes[: int(len(data_bytes) * fraction)])
    assert "params is damaged" in _error(saved)


def test_every_array_problem_is_listed(weights, ours, config, tmp_path):
    tree = ours(weights(), True)
    tree["language"]["norm"]["scale"] = np.ones(32, np.float32)
    tree["language"]["head"]["extra"] = np.ones(3, np.float32)
    del tree["language"]["layers"][1]["ffn"]["w_in"]
    native.save(tmp_path / "n", config, jax.tree.map(jax.numpy.asarray, tree), b"")
    message = _error(tmp_path / "n")
    for part in (
        "3 problems",
        "language.norm.scale has shape (32,), not (64,)",
        "language.head.extra is unexpected",
        "language.layers.1.ffn.w_in is missing",
    ):
        assert part in message


def test_nans(weights, ours, config, tmp_path):
    tree = ours(weights(), False)
    tree["language"]["layers"]["ffn"]["w_out"][1, 7, -1, -1] = np.nan
    native.save(tmp_path / "n", config, jax.tree.map(jax.numpy.asarray, tree), b"")
    assert "language.layers.1.ffn.w_out holds NaNs" in _error(tmp_path / "n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("format"), "does not describe a sphinx-jax checkpoint"),
        (lambda c: c.update(version=99), "has version 99"),
        (lambda c: c.pop("stacked"), 'lacks "stacked"'),
        (lambda c: c.pop("model"), "config"),
        (lambda c: c["model"].pop("language"), "language"),
        (lambda c: c["model"]["language"].update(dim="64"), "'dim'"),
        (lambda c: c["model"]["language"].update(num_heads=7), "are inconsistent"),
        (lambda c: c["model"]["language"].update(num_layers=3), r"layers\.2\..* is missing"),
        (lambda c: c["model"]["language"].update(hidden_dim=64), r"w_in has shape"),
        (lambda c: c["model"].update(balance_weight=None), "balance_weight"),
    ],
)
def test_wrong_config(saved, change, message):
    file = saved / "config.json"
    described = json.loads(file.read_text())
    change(described)
    file.write_text(json.dumps(described))
    assert re.search(message, _error(saved))


def test_config_that_is_not_json(saved):
    (saved / "config.json").write_text("{")
    assert "is not JSON" in _error(saved)
