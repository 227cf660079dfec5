"""`train.py --adapters`: adapters are trained on, or merged into the base that another stage trains."""

import dataclasses

import numpy as np
import pytest

from sphinx_jax.checkpoints import adapters, lora
from sphinx_jax.cli import common, train
from tests.instruments.adapters import CONFIG, MINE, save_adapters, save_base
from tests.training.test_killed import losses, write_data


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("starting"))


@pytest.fixture(scope="module")
def directories(base):
    return save_adapters(base)


@pytest.fixture(scope="module")
def call(base, tmp_path_factory):
    """Runs train.py on sums as text from the base."""
    data = write_data(tmp_path_factory.mktemp("data"))
    argv = ["--data", data, "--max-length", "64", "--batch-size", "8", "--log-every", "1", "--init", base]
    return lambda *more: common.run(train.main, [*map(str, argv), *map(str, more)])


@pytest.mark.slow
def test_adapters_are_trained_on(call, base, directories, tmp_path):
    """After a step that learns nothing they are what they were; a mesh reads the same."""
    nothing = ("--stage", "lora", "--steps", 1, "--lr", 1e-30)
    assert call(*nothing, "--adapters", directories["mine"], "--out", tmp_path / "out") == 0
    given, saved = lora.read_run(directories["mine"], CONFIG), lora.read_run(tmp_path / "out", CONFIG)
    assert lora.read_adapter_info(tmp_path / "out").lora == MINE
    for path, pair in given.factors.items():
        for before, after in zip(pair, saved.factors[path], strict=True):
            np.testing.assert_array_equal(after, before)
    mesh = ("--mesh.tensor", 2, "--mesh.expert", 2)
    assert call(*nothing, *mesh, "--adapters", directories["mine"], "--out", tmp_path / "mesh") == 0
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "out"), rtol=1e-4)
    # The loss is that of the merged model, as another stage starts from it.
    full = ("--stage", "language", "--steps", 1, "--lr", 1e-30)
    assert call(*full, "--adapters", directories["mine"], "--out", tmp_path / "full") == 0
    (_, merged, _), (_, unmerged, _) = losses(tmp_path / "full")[0], losses(tmp_path / "out")[0]
    assert merged == pytest.approx(unmerged, rel=1e-5)


@pytest.mark.slow
def test_fewer_ranks_of_one_matrix(call, base, directories, tmp_path, monkeypatch):
    """The others of its ranks begin as new adapters do, and learn."""
    run = lora.read_run(directories["mine"], CONFIG)
    wo = ("language", "layers", "attention", "wo")
    a, b = run.factors[wo]
    given = dataclasses.replace(run, factors={**run.factors, wo: (a[..., :2], b[:, :2])})
    monkeypatch.setattr(adapters, "read_adapters", lambda path, source: given)
    options = ("--stage", "lora", "--adapters", directories["mine"])
    assert call(*options, "--steps", 1, "--lr", 1e-30, "--out", tmp_path / "start") == 0
    start_a, start_b = lora.read_run(tmp_path / "start", CONFIG).factors[wo]
    np.testing.assert_array_equal(start_a[..., :2], a[..., :2])
    np.testing.assert_array_equal(start_b[:, :2], b[:, :2])
    assert start_a[..., 2].any() and not np.abs(start_b[:, 2]).max() > 1e-20


def test_refusals(call, base, directories, tmp_path, capsys):
    for argv, message in (
        (("--stage", "lora", "--lora-rank", 4, "--adapters", directories["mine"]), "--lora-rank is that of --adapters"),
        (("--stage", "lora", "--adapters", tmp_path), "holds no adapters"),
    ):
        assert call(*argv, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert common.run(train.main, ["--adapters", str(directories["mine"]), "--out", str(tmp_path / "out")]) == 2
    assert "--adapters adapt a checkpoint: give it with --init" in capsys.readouterr().err
