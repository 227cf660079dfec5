"""`--plan` on the command line: user errors, reports, and plans without the CUDA compiler."""

import dataclasses
import functools
import json
import re

import pytest

from sharding import MeshShape
from sphinx_jax import config
from sphinx_jax.cli import common, infer, plan, train
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan import aot
from sphinx_jax.memory_plan.inference import inference_plan
from sphinx_jax.memory_plan.training import training_batch, training_plan
from sphinx_jax.training.train_config import TrainConfig

SMALL = SphinxConfig(DecoderConfig(64, 128, 2, num_heads=4, num_kv_heads=2, num_experts=4, vocab_size=256), None)

WRONG = {
    "infer --plan": "--plan needs a GPU",
    "infer --gpu l4": "--gpu belongs to --plan",
    "infer --preset nano": "--preset belongs to --plan",
    "infer --plan --gpu t4": "no bfloat16",
    "infer --plan --gpu unheard": "unknown GPU 'unheard'",
    "infer --plan --gpu l4 --preset unheard": "unknown preset",
    "infer --plan --gpu l4 --num-gpus 6": "over 6 devices; use 4 or 8 devices",
    "infer --plan --gpu l4 --num-gpus 0": "--num-gpus must be 1 or more",
    "infer --plan --gpu l4 --gpus-per-host 0": "--gpus-per-host must be 1 or more",
    "infer --gpus-per-host 4": "--gpus-per-host belongs to --plan",
    "infer --plan --gpu l4 --num-gpus 4 --mesh.tensor 2": "has 2 devices and --num-gpus is 4",
    "infer --plan --gpu l4 --sweep --mesh.tensor 2": "leave out either the --mesh options or --sweep",
    "infer --plan --gpu l4 --max-model-len 1000": "an image alone takes 1455 tokens",
    "infer --plan --gpu l4 --mesh.tensor 3": "not divisible by mesh axis 'tensor' of size 3",
    "train --plan": "--plan needs a GPU",
    "train --plan --gpu l4 --preset sphinx-moe --num-gpus 7": "over 7 devices; use 4 or 8 devices",
    "train --plan --gpu l4 --preset sphinx-moe --batch-size 3 --num-gpus 16 --max-length 512": "does not divide",
    "train --plan --gpu l4 --preset sphinx-moe --max-length 256": "--max-length 256 is too short",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items())
def test_user_errors(line, message, capsys, needs_gpu_compiler):
    program, *args = line.split()
    main = {"infer": infer.main, "train": train.main}[program]
    assert common.run(main, args) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.fixture(scope="module")
def compile_once():
    """`inference_plan`, which compiles for a mesh once: all GPUs here are an RTX 3090, of some memory or name."""
    compiled = functools.cache(inference_plan)

    def planned(name, config, gpu, shape, **options):
        return dataclasses.replace(compiled(name, config, find_gpu("rtx3090"), shape, **options), gpu=gpu)

    return planned


@pytest.fixture
def small(monkeypatch, compile_once):
    monkeypatch.setitem(config.PRESETS, "small", lambda: SMALL)
    monkeypatch.setattr(plan, "inference_plan", compile_once)


@pytest.mark.optimized
def test_json_of_inference(small, capsys, needs_gpu_compiler):
    args = ["--plan", "--gpu", "rtx3090", "--num-gpus", "2", "--preset", "small", "--max-model-len", "64", "--json"]
    assert infer.main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True
    assert (report["compiler"], report["gpu"], report["num_gpus"]) == ("gpu", "rtx3090", 2)
    assert report["mesh"] == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 2}
    parts = dict(report["per_device"])
    total, capacity = parts.pop("total_bytes"), parts.pop("capacity_bytes")
    assert set(parts) == {
        f"{part}_bytes"
        for part in ("parameters", "optimizer", "gradients", "kv_cache", "inputs", "temporaries", "reserve")
    }
    assert total == sum(parts.values()) < capacity == find_gpu("rtx3090").pool_bytes < 24 * 2**30
    assert report["host"] == {"pinned_bytes": 0}
    assert parts["kv_cache_bytes"] == 2 * 2 * 64 * 2 * 16 * 2 / 2
    assert {c["kind"] for c in report["collectives"]} >= {"all-reduce"}
    assert all(set(c) == {"kind", "axes", "count", "bytes"} for c in report["collectives"])
    assert 0.5 <= report["share"]["parameters"] < 0.6


@pytest.mark.slow
@pytest.mark.optimized
def test_text_report_and_sweep(small, capsys, needs_gpu_compiler):
    args = ["--plan", "--gpu", "rtx3090", "--num-gpus", "2", "--preset", "small", "--max-model-len", "64"]
    assert infer.main(args) == 0
    out = capsys.readouterr().out
    for part in (
        "parameters, language",
        "KV cache",
        "reserve",
        "fits, with",
        "collectives of: decode step",
        "all-reduce",
    ):
        assert part in out
    assert infer.main([*args, "--sweep"]) == 0
    out = capsys.readouterr().out
    assert "tensor 2" in out
    assert "expert 2" in out
    assert "run: python infer.py" in out


@pytest.mark.slow
@pytest.mark.optimized
def test_too_large_is_exit_code_1(small, capsys, tmp_path, needs_gpu_compiler):
    gpu = tmp_path / "small.json"
    gpu.write_text(json.dumps(dataclasses.asdict(find_gpu("rtx3090")) | {"name": "small GPU", "memory_mib": 512}))
    args = ["--plan", "--gpu", str(gpu), "--num-gpus", "2", "--preset", "small", "--max-model-len", "64"]
    assert infer.main(args) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.slow
def test_arguments_are_exact_without_the_gpu_compiler(monkeypatch):
    """The CPU compiler gives the same argument bytes; parameters, moments and gradients follow by arithmetic."""
    monkeypatch.setattr(aot, "has_gpu_compiler", lambda: False)
    shape, gpu = MeshShape(fsdp=2, tensor=2), find_gpu("rtx3090")
    tensor = inference_plan(
        "small", SMALL, gpu, MeshShape(tensor=2), dtype="bfloat16", max_num_seqs=1, max_model_len=64
    )
    assert tensor.compiler == "cpu-estimate"
    assert tensor.kv_cache == 2 * 2 * 64 * 2 * 16 * 2 // 2
    train_config = TrainConfig(steps=10, batch_size=4, moments="bfloat16")
    step = training_plan("small", SMALL, gpu, shape, train_config, training_batch(SMALL, train_config, 32))
    assert step.compiler == "cpu-estimate"
    assert step.optimizer == pytest.approx(sum(step.parameters.values()), abs=64)
    assert step.gradients == sum(step.parameters.values())
    assert step.temporaries > 0


@pytest.mark.slow
def test_auto_is_a_number_that_fits(monkeypatch, small, capsys, tmp_path):
    """The plan that is printed fits, and the state of the next number does not beside its temporaries."""
    monkeypatch.setattr(aot, "has_gpu_compiler", lambda: False)
    gpu = dataclasses.replace(find_gpu("rtx3090"), name="small GPU", memory_mib=1124)
    file = tmp_path / "small.json"
    file.write_text(json.dumps(dataclasses.asdict(gpu)))
    options = ["--preset", "small", "--max-model-len", "4096", "--dtype", "float32", "--max-num-seqs", "auto"]
    assert infer.main(["--plan", "--json", "--gpu", str(file), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    (number,) = map(int, re.findall(r"(\d+) sequences × 4,096 tokens", report["job"]))
    # A sequence takes 4,096 positions, and each of up to 64 prefixes 512, of 2 layers x 2 heads x 16 x 2 x 4 bytes.
    assert report["per_device"]["kv_cache_bytes"] == (number * 4096 + min(number, 64) * 512) * 512
    assert number % 8 == 0 and report["fits"]
    more = inference_plan(
        "small", SMALL, gpu, MeshShape(), dtype="float32", max_num_seqs=number + 8, max_model_len=4096
    )
    assert not more.fits


@pytest.mark.slow
def test_reports_print_brackets_and_colons_as_they_are(monkeypatch, capsys, tmp_path, compile_once):
    """Reports contain no markup: names, paths and commands of the user, and the hint to install an extra."""
    monkeypatch.setattr(aot, "has_gpu_compiler", lambda: False)
    monkeypatch.setattr(plan, "inference_plan", compile_once)
    monkeypatch.setitem(config.PRESETS, "[b]small[/b]:cat:", lambda: SMALL)
    monkeypatch.setenv("COLUMNS", "400")
    gpu = tmp_path / "bracket.json"
    gpu.write_text(json.dumps(dataclasses.asdict(find_gpu("rtx3090")) | {"name": "gpu [red] :dog:"}))
    args = ["--plan", "--gpu", str(gpu), "--preset", "[b]small[/b]:cat:", "--max-model-len", "64"]
    assert infer.main(args) == 0
    out = capsys.readouterr().out
    assert "pip install -e '.[plan]'" in out
    assert "[b]small[/b]:cat:, bfloat16" in out
    assert "XLA's pool on gpu [red] :dog:" in out
    assert infer.main([*args, "--sweep"]) == 0
    assert "--checkpoint [B]SMALL[/B]:CAT:" in capsys.readouterr().out
