"""`python -m sphinx_jax.checkpoints`."""

import re

import jax
import numpy as np
import pytest

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.cli import common
from sphinx_jax.cli import convert as program


def run(*arguments) -> int:
    return common.run(program.main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_convert_through_every_format(golden_checkpoint, same, tmp_path):
    source = golden_checkpoint("ens5", 2)
    assert run("convert", source, tmp_path / "native", "--format", "native") == 0
    assert run("convert", tmp_path / "native", tmp_path / "accessory", "--format", "accessory", "--shards", "4") == 0
    assert run("convert", tmp_path / "accessory", tmp_path / "mixtral", "--format", "mixtral", "--shards", 2) == 0
    mesh = sharding.make_mesh()
    exact = checkpoints.load(source, mesh)
    for name in ("native", "accessory"):
        loaded = checkpoints.load(tmp_path / name, mesh)
        assert loaded.config == exact.config
        same(loaded.params, exact.params)
    language = checkpoints.load(tmp_path / "mixtral", mesh)
    assert language.config.language == exact.config.language
    same(language.params["language"], exact.params["language"])
    assert language.tokenizer_bytes == exact.tokenizer_bytes


def test_convert_to_another_type(accessory_directory, weights, ours, same, tmp_path):
    assert run("convert", accessory_directory(), tmp_path / "out", "--format", "mixtral", "--dtype", "float32") == 0
    wide = jax.tree.map(lambda x: x.astype(np.float32), ours(weights(), True))
    same(checkpoints.load(tmp_path / "out", sharding.make_mesh()).params, wide)


def test_native_needs_a_tokenizer(accessory_directory, tmp_path, capsys):
    path = accessory_directory()
    (path / "tokenizer.model").unlink()
    assert run("convert", path, tmp_path / "out", "--format", "native") == 2
    assert "copy the model's tokenizer.model" in capsys.readouterr().err


def test_inspect(golden_checkpoint, capsys):
    assert run("inspect", golden_checkpoint("ens", 2)) == 0
    out = capsys.readouterr().out
    assert "accessory (mixtral_sparse_ens), 2 shards" in out
    assert "bfloat16 (488 tensors)" in out
    # By hand: 32000 x 64; 2 layers x 64 x (64 + 32 + 32 + 64); 2 layers x (4 experts x 3 x 64 x 128 + 64 x 4).
    for count, part in ((2_048_000, "language.embedding"), (24_576, "language.attention"), (197_120, "language.ffn")):
        assert re.search(rf"{count:,}  {re.escape(part)}$", out, re.MULTILINE)
    assert re.search(r"2 x llma\.layers\.\*\.attention\.wq\.weight  \[32, 64\]  bfloat16$", out, re.MULTILINE)
    assert re.search(r"llma\.clip\.logit_scale .*\(not used\)$", out, re.MULTILINE)


def test_inspect_every_format(golden_checkpoint, tmp_path, capsys):
    for name in ("native", "mixtral"):
        assert run("convert", golden_checkpoint("ens", 1), tmp_path / name, "--format", name) == 0
        capsys.readouterr()
        assert run("inspect", tmp_path / name) == 0
        assert re.search(rf"^format +{name}", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "/absent"], "/absent is not a directory"),
        (["inspect"], "see python -m sphinx_jax.checkpoints --help"),
        ([], "see python -m sphinx_jax.checkpoints --help"),
        (["convert", "{source}", "{out}", "--format", "gguf"], "see python -m sphinx_jax.checkpoints --help"),
        (["convert", "{source}", "{out}", "--format", "accessory", "--shards", "3"], "--shards 3 does not divide"),
        (
            ["convert", "{source}", "{out}", "--format", "native", "--shards", "2"],
            "2 does not go with format native",
        ),
        (["convert", "{source}", "{out}", "--format", "mixtral", "--shards", "0"], "--shards 0 does not go with"),
        (["convert", "{source}", "{source}", "--format", "native"], "exists already"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(golden_checkpoint, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    places = {"source": golden_checkpoint("ens", 1), "out": out}
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert list(tmp_path.iterdir()) == []
