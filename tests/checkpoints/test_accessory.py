"""Accessory directories: both layouts at any number of shards, on any mesh; damage is one error that lists all."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import loaded_model
from sphinx_jax.checkpoints.formats import accessory
from sphinx_jax.checkpoints.io import torch_files
from sphinx_jax.config import PRESETS, nano
from sphinx_jax.errors import UserError


@pytest.mark.parametrize("llama_type", ["mixtral_sparse", "mixtral"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_reads_both_layouts_at_any_number_of_shards(
    accessory_directory, weights, ours, same, config, llama_type, shards
):
    path = accessory_directory(shards=shards, llama_type=llama_type)
    loaded = accessory.load(path, sharding.make_mesh(tensor=2))
    assert loaded.config == config
    assert loaded.tokenizer_bytes == b"a tokenizer"
    same(loaded.params, ours(weights(), unstacked=False))


@pytest.mark.parametrize("shards", [1, 8])
def test_every_mesh_gets_the_same_numbers(accessory_directory, weights, ours, same, mesh, shards):
    path = accessory_directory(shards=shards)
    same(accessory.load(path, mesh, unstacked=True).params, ours(weights(), unstacked=True))
    stacked = accessory.load(path, mesh, "float32").params
    same(stacked, jax.tree.map(lambda x: x.astype(np.float32), ours(weights(), unstacked=False)))
    _, abstract = loaded_model.abstract_model(accessory.open_directory(path).config, mesh, None, False)
    assert sharding.shardings_of(stacked) == sharding.shardings_of(abstract)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_writes_what_the_original_writes(accessory_directory, weights, config, ours, tmp_path, shards):
    theirs = accessory_directory(shards=shards)
    mesh = sharding.make_mesh(tensor=2, expert=2, fsdp=2)
    loaded = accessory.load(theirs, mesh)
    out = tmp_path / "out"
    accessory.save(out, loaded.config, loaded.params, b"a tokenizer", shards)
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in theirs.iterdir())
    for file in out.glob("*.pth"):
        written, original = torch_files.read(file).tensors, torch_files.read(theirs / file.name).tensors
        assert written.keys() == original.keys()
        for name, tensor in written.items():
            assert tensor.shape == original[name].shape, name
            assert tensor.tobytes() == original[name].tobytes(), name
    assert json.loads((out / "meta.json").read_text()) == {"llama_type": "mixtral_sparse"}
    assert accessory.open_directory(out).config == config


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ens", "ens5"])
def test_golden_checkpoint_round_trip(golden_checkpoint, variant, tmp_path, same):
    one = checkpoints.load(golden_checkpoint(variant, 1), sharding.make_mesh())
    two = checkpoints.load(golden_checkpoint(variant, 2), sharding.make_mesh(tensor=2, expert=2, fsdp=2))
    same(two.params, one.params)
    out = tmp_path / "out"
    accessory.save(out, two.config, two.params, two.tokenizer_bytes, shards=2)
    for file in ("consolidated.00-of-02.model.pth", "consolidated.01-of-02.model.pth"):
        original = torch_files.read(golden_checkpoint(variant, 2) / file).tensors
        written = torch_files.read(out / file).tensors
        for name, tensor in written.items():
            assert tensor.tobytes() == original[name].tobytes(), name
        # The tensors that no forward pass uses are not written.
        assert len(original) - len(written) == 8
    assert (out / "tokenizer.model").read_bytes() == (golden_checkpoint(variant, 1) / "tokenizer.model").read_bytes()
    again = accessory.open_directory(out)
    assert again.config == one.config
    meta = {"ens": "mixtral_sparse_ens", "ens5": "mixtral_sparse_ens5"}[variant]
    assert again.format == f"accessory ({meta})"


def test_without_vision_json_the_encoders_are_the_published_ones(golden_checkpoint, tmp_path):
    path = _copy(golden_checkpoint("ens5", 1), tmp_path)
    (path / "vision.json").unlink()
    assert accessory.open_directory(path).config.vision == PRESETS["sphinx-moe-1k"]().vision


def _copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "copy")


def _error(path, **kwargs) -> str:
    """The one error of loading; no device array is left of the attempt."""
    before = len(jax.live_arrays())
    with pytest.raises(UserError) as caught:
        checkpoints.load(path, sharding.make_mesh(), **kwargs)
    message = str(caught.value)
    caught = None
    assert len(jax.live_arrays()) == before
    return message


def _edit(path, name, change) -> None:
    file = path / name
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_missing_shards(accessory_directory):
    path = accessory_directory(shards=4)
    (path / "consolidated.01-of-04.model.pth").unlink()
    (path / "consolidated.03-of-04.model.pth").unlink()
    message = _error(path)
    assert "consolidated.01-of-04.model.pth, consolidated.03-of-04.model.pth" in message
    assert "00-of-04" not in message


def test_extra_shard(accessory_directory):
    path = accessory_directory(shards=2)
    shutil.copy(path / "consolidated.01-of-02.model.pth", path / "consolidated.02-of-02.model.pth")
    assert "must hold 2 files of one set" in _error(path)


def test_two_sets_in_one_directory(accessory_directory):
    path = accessory_directory(shards=2)
    shutil.copy(path / "consolidated.01-of-02.model.pth", path / "consolidated.01-of-04.model.pth")
    assert "must hold one set" in _error(path)


def test_shards_of_two_checkpoints(accessory_directory, weights):
    path, other = accessory_directory(shards=2), accessory_directory(weights(1), shards=2, name="other")
    shutil.copy(other / "consolidated.01-of-02.model.pth", path)
    message = _error(path)
    assert "llma.norm.weight differs between shards 0 and 1, which are of different checkpoints" in message
    assert "llma.layers.1.feed_forward.gate.weight" in message


def test_every_tensor_problem_is_listed(accessory_directory, weights):
    w = weights()
    del w["norm.weight"], w["layers.1.attention.wo.weight"]
    w["layers.0.attention.wq.weight"] = w["layers.0.attention.wq.weight"][:, :-1]
    w["layers.0.ffn_norm.weight"] = np.ones(64, np.int64)
    w["surplus.weight"] = np.ones(3, np.float32)
    message = _error(accessory_directory(w))
    for part in (
        "5 problems",
        "llma.norm.weight is missing",
        "llma.layers.1.attention.wo.weight is missing",
        "llma.layers.0.attention.wq.weight has shape (64, 63), not (64, 64)",
        "llma.layers.0.ffn_norm.weight holds int64, not floating-point numbers",
        "llma.surplus.weight is unexpected",
    ):
        assert part in message


def test_many_problems_are_listed_by_kind(accessory_directory):
    path = accessory_directory()
    _edit(path, "config.json", lambda c: c.update(n_layers=10))
    message = _error(path)
    assert "(80 problems)" in message
    assert "llma.layers.*.attention.wq.weight is missing (8 times)" in message
    assert "llma.layers.*.ffn_norm.weight is missing (8 times)" in message


def test_a_tensor_missing_from_one_shard(accessory_directory):
    path = accessory_directory(shards=2)
    file = path / "consolidated.01-of-02.model.pth"
    tensors = torch_files.read(file).tensors
    del tensors["llma.layers.0.feed_forward.w3"]
    with torch_files.Writer(path / "new", {k: (t.shape, t.dtype) for k, t in tensors.items()}) as new:
        for name, tensor in tensors.items():
            new.write(name, [tensor])
    (path / "new").rename(file)
    assert "llma.layers.0.feed_forward.w3 of shard 1 is missing" in _error(path)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("value", [np.nan, -np.nan])
def test_nans_are_named_and_nothing_is_loaded(accessory_directory, weights, shards, value):
    w = weights()
    w["layers.1.feed_forward.experts.5.w3.weight"][-1, -1] = value
    path = accessory_directory(w, shards)
    for kwargs in ({}, {"dtype": "float32"}, {"unstacked": False}):
        assert re.search(r"llma\.layers\.1\.feed_forward\.w3 holds NaNs", _error(path, **kwargs))


def test_infinities_are_numbers(accessory_directory, weights):
    w = weights()
    w["norm.weight"][0] = -np.inf
    loaded = accessory.load(accessory_directory(w), sharding.make_mesh())
    assert np.asarray(loaded.params["language"]["norm"]["scale"])[0] == -np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(hidden_dim=40), r"w1 has shape \(384, 64\), not \(320, 64\)"),
        (lambda c: c.update(n_layers=3), r"llma\.layers\.2\.attention\.wq\.weight is missing"),
        (lambda c: c.update(n_layers=1), r"llma\.layers\.1\.attention\.wq\.weight is unexpected"),
        (lambda c: c.update(n_heads=8), "wk.weight has shape"),
        (lambda c: c.update(n_heads=7), "heads .* are inconsistent"),
        (lambda c: c.pop("hidden_dim"), "lacks 'hidden_dim'"),
        (lambda c: c.pop("moe"), "lacks 'moe'"),
        (lambda c: c.update(dim="64"), "'dim' must be an integer"),
        (lambda c: c.update(n_heads=0), "'n_heads' must be an integer, 1 or more"),
        (lambda c: c.update(norm_eps=-1), "'norm_eps' must be a number"),
        (lambda c: c.update(n_layers=10**9), "are too many"),
        (lambda c: c.update(rope_scaling=2.0), "'rope_scaling' is 2.0"),
        (lambda c: c["moe"].update(num_experts=4), "has shape"),
        (lambda c: c["moe"].update(num_experts_per_tok=9), "9 experts per token"),
    ],
)
def test_wrong_config(accessory_directory, change, message):
    path = accessory_directory()
    _edit(path, "config.json", change)
    assert re.search(message, _error(path))


@pytest.mark.parametrize("name", ["config.json", "meta.json"])
@pytest.mark.parametrize("text", [None, "", "{", "[1]", '"x"', "[" * 100_000])
def test_unreadable_json(accessory_directory, name, text):
    path = accessory_directory()
    (path / name).unlink()
    if text is not None:
        (path / name).write_text(text)
    assert str(path / name) in _error(path)


@pytest.mark.parametrize("name", ["config.json", "meta.json"])
def test_byte_order_mark_before_json(accessory_directory, config, name):
    path = accessory_directory()
    (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
    assert accessory.open_directory(path).config == config


def test_unknown_model(accessory_directory):
    path = accessory_directory()
    _edit(path, "meta.json", lambda m: m.update(llama_type="llama_ens"))
    assert "unknown llama_type 'llama_ens'" in _error(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(sam={}),
        lambda v: v["clip_vit"].update(depth=3),
        lambda v: v["clip_vit"].update(heads=5),
        lambda v: v["clip_vit"].update(layers="2"),
        lambda v: v["convnext"].update(dims=[8, 16]),
        lambda v: v["qformer"].update(queries=0),
        lambda v: v.update(dinov2=[1]),
    ],
)
def test_wrong_vision_json(golden_checkpoint, tmp_path, change):
    path = _copy(golden_checkpoint("ens", 1), tmp_path)
    _edit(path, "vision.json", change)
    assert "vision.json" in _error(path) or "llma." in _error(path)


def test_vocabulary_size_missing_in_the_config(accessory_directory, config):
    path = accessory_directory()
    _edit(path, "config.json", lambda c: c.update(vocab_size=-1))
    assert accessory.open_directory(path).config == config


def test_what_the_layout_cannot_hold(tmp_path, accessory_directory):
    loaded = accessory.load(accessory_directory(), sharding.make_mesh())
    with pytest.raises(UserError, match="--shards 3 does not divide the key/value heads, 8"):
        accessory.save(tmp_path / "out", loaded.config, loaded.params, None, shards=3)
    with pytest.raises(UserError, match="exists already"):
        accessory.save(tmp_path / "accessory", loaded.config, loaded.params)
    with pytest.raises(UserError, match="encoders only; choose --format native"):
        accessory.save(tmp_path / "out", nano(), loaded.params)
    assert not (tmp_path / "out").exists()


def test_directories_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no known checkpoint"):
        checkpoints.load(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        checkpoints.load(tmp_path / "absent")
