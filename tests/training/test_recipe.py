"""The settings of a large model: the original's where no option is given, and what fits where they do not."""

import dataclasses
import json

import pytest
from rich.console import Console

import sharding
from sharding import MeshShape
from sphinx_jax import config
from sphinx_jax.cli import common, train
from sphinx_jax.cli.train_options import Options
from sphinx_jax.cli.train_recipe import print_settings, with_recipe
from sphinx_jax.config import DecoderConfig, SphinxConfig, preset
from sphinx_jax.errors import UserError
from sphinx_jax.memory_plan.fit import bytes_needed, check_fits
from sphinx_jax.memory_plan.training import training_batch
from sphinx_jax.training import recipe
from sphinx_jax.training.train_config import TrainConfig
from tests.training.test_killed import write_data

SMALL = SphinxConfig(DecoderConfig(32, 64, 1, num_heads=2, num_kv_heads=2, num_experts=2, vocab_size=512), None)


def chosen(line, model, num_devices=1):
    argv = line.split()
    options = common.parse(Options, argv, "train.py", "")
    return with_recipe(options, argv, preset(model), lambda: num_devices)[0]


def test_the_original_on_its_32_gpus():
    """Batch 4 x accumulation 4 in each of four groups of eight GPUs; values of its script for SPHINX."""
    options = chosen("", "sphinx-moe", 32)
    assert options.mesh == MeshShape(tensor=8, fsdp=4)
    assert (options.train.batch_size, options.train.grad_accum_steps) == (64, 4)
    expected = {"lr": 5e-6, "min_lr": 0.0, "weight_decay": 0.0, "clip_norm": 8.0, "stage": "mm_stage2"}
    expected |= {"dtype": "bfloat16", "remat": "block", "moments": "float32"}
    assert {name: getattr(options.train, name) for name in expected} == expected
    # An image takes 291 tokens, and 512 are left for text.
    assert options.yaml.max_length == 803 and chosen("", "sphinx-moe-1k").yaml.max_length == 1455 + 512
    epoch = options.train_config(64_000)
    assert (epoch.steps, epoch.warmup_steps) == (1000, 30)


def test_text_alone_and_adapters():
    text = chosen("", "mixtral-8x7b", 32)
    assert (text.train.clip_norm, text.yaml.max_length, text.train.batch_size) == (2.0, 4096, 128)
    assert (text.train.grad_accum_steps, text.train_config(128_000).warmup_steps) == (8, 100)
    adapters = chosen("--stage lora --quantize int4", "sphinx-moe")
    assert (adapters.train.stage, adapters.train.lr, adapters.train.grad_accum_steps) == ("lora", 1e-4, 64)


def test_given_options_are_kept():
    line = "--lr=3e-3 --steps 900 --warmup_steps 100 --batch-size 32 --weight-decay 0.05 --max-length 2048 --remat none"
    options = chosen(f"{line} --mesh.tensor 4 --mesh.data 2", "sphinx-moe", 32)
    assert options.train_config(64_000) == dataclasses.replace(
        TrainConfig(lr=3e-3, batch_size=32, weight_decay=0.05, remat="none", steps=900, warmup_steps=100),
        **{"grad_accum_steps": 4, "stage": "mm_stage2", "dtype": "bfloat16", "clip_norm": 8.0},
    )
    assert options.yaml.max_length == 2048 and options.mesh == MeshShape(tensor=4, data=2)


@pytest.mark.parametrize("model", ["nano", "mixtral-140m"])
def test_small_models_keep_their_defaults(model):
    assert chosen("", model, 8) == Options()


def test_one_table_says_where_settings_come_from():
    console = Console(record=True, width=120, quiet=True)
    argv = ["--lr", "1e-5", "--stage", "lora"]
    options, _ = with_recipe(common.parse(Options, argv, "train.py", ""), argv, preset("sphinx-moe"), lambda: 1)
    console.quiet = False
    print_settings(options, argv, console)
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["--lr", "1e-05", "given"] in rows and ["--stage", "lora", "given"] in rows
    assert ["--warmup-epochs", "0.03", "recipe"] in rows and ["--lora-rank", "8", "recipe"] in rows
    assert ["--mesh", "one", "device", "all", "devices"] in rows
    assert not any(row[:1] == ["--steps"] for row in rows)


@pytest.mark.slow
def test_a_run_has_the_recipe(monkeypatch, tmp_path, capsys):
    """Its settings are printed, recorded, and those that it is trained with."""
    monkeypatch.setattr(recipe, "MIN_EXPERT_PARAMETERS", 0)
    monkeypatch.setitem(config.PRESETS, "small", lambda: SMALL)
    argv = ["--preset", "small", "--data", write_data(tmp_path), "--max-length", "64", "--batch-size", "32"]
    argv += ["--mesh.tensor", "2", "--out", tmp_path / "run"]
    assert common.run(train.main, list(map(str, argv))) == 0
    assert "--grad-accum-steps  8 " in capsys.readouterr().out
    train_config = json.loads((tmp_path / "run" / "summary.json").read_text())["train_config"]
    # One epoch of 108 records.
    assert (train_config["steps"], train_config["lr"], train_config["dtype"]) == (3, 5e-6, "bfloat16")
    assert json.loads((tmp_path / "run" / "options.json").read_text())["mesh"]["tensor"] == 2


@pytest.mark.slow
def test_what_fits_is_named_before_weights_are_read():
    """The nearest settings that need no more than there is: smaller microbatches, or adapters too; or none."""
    mesh = sharding.make_mesh(tensor=2)
    train_config = TrainConfig(batch_size=8, stage="all", remat="block")
    batch = training_batch(SMALL, train_config, 64)

    def size(**changes):
        changed = dataclasses.replace(train_config, **changes)
        return bytes_needed(SMALL, changed, mesh=mesh, batch_shapes=batch, capacity=2**40)

    def problem(capacity):
        with pytest.raises(UserError) as error:
            check_fits(SMALL, train_config, mesh, batch, capacity)
        return str(error.value)

    whole, parts, adapters = size(), size(grad_accum_steps=8), size(grad_accum_steps=8, stage="lora")
    assert whole > parts > size(grad_accum_steps=8, moments="factored") > adapters
    check_fits(SMALL, train_config, mesh, batch, whole)
    assert "; --grad-accum-steps 8 fits, with" in problem(whole - 1)
    assert "; --grad-accum-steps 8 --stage lora fits, with" in problem(adapters)
    assert "use more GPUs" in problem(1000)
