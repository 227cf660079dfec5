"""Smoke tests of the benchmarks: gpu.py without a GPU, others at tiny size."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import pytest

from sphinx_jax.config import ConvNextConfig, DecoderConfig, SphinxConfig


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    # peer.py blocks torchvision for its whole process; this process may run the parity tests next.
    monkeypatch.setitem(sys.modules, "torchvision", None)
    yield importlib.import_module
    for name in ("attention", "convnext", "first_card", "gpu", "gpu_report", "jobs", "mesh_scaling", "peer"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.fixture
def gpu(benchmark):
    return benchmark("gpu")


def test_layers_that_fit(gpu):
    """All 46.7 billion parameters in bfloat16 on an H200, fewer layers on an H100 and in training."""

    def layers(memory, parameter_bytes):
        return gpu.layers_that_fit(DecoderConfig(), memory, parameter_bytes).num_layers

    assert layers(0.93 * 141e9, 2) == 32
    # A layer has 1.45 billion parameters, embedding and head 0.26.
    assert layers(0.93 * 80e9, 2) == (0.93 * 80e9 - 8e9 - 2 * 0.262e9) // (2 * 1.4512e9)
    assert layers(0.93 * 80e9, 20) == 2
    assert layers(1e9, 2) == 1


def test_report_joins_both_sides_and_leaves_missing_cells_empty(gpu):
    found = {part: [] for part in gpu.PARTS}
    found["inference"] = [
        {"device": "GPU", "flops": 7e14, "bandwidth": 3e12},
        {"layers": 22},
        {"job": "decode, batch 1", "seconds": 0.5, "tokens": 32, "roofline_fraction": 0.7},
        {"memory": {"inference": {"planned": 2**32, "peak": None}}},
    ]
    found["transformers"] = [
        {"job": "decode, batch 1", "their_seconds": 1.5},
        {"job": "prefill 512", "their_seconds": 0.25},
    ]
    found["experts"] = [
        {
            "tokens": 8,
            "implementation": "dense",
            "default": True,
            "flops": 6e12,
            "forward_seconds": 0.5,
            "forward_backward_seconds": 1.0,
        }
    ]
    result = gpu.report(found, {"training": "out of memory"})
    assert result["jobs"][0]["ratio"] == 3
    text = gpu.markdown(result | {"date": "today", "versions": "jax", "commit": "abc"})
    for line in (
        "| decode, batch 1 | 500.00 |  | 64 | 0.70 | 1500.00 | 3.00 |",
        "| prefill 512 |  |  |  |  | 250.00 |  |",
        "| inference | 4.00 |  |",
        "| 8 | dense (default) | 500.000 | 12.0 | 1000.000 | 18.0 |",
        "training: out of memory",
    ):
        assert line in text.splitlines()
    assert "22 layers for inference, no for training" in text


@pytest.mark.slow
def test_parts_of_the_first_card(gpu, monkeypatch):
    """Each part at tiny size on the CPU, without timing: what it measures, and what it needs no GPU for."""
    monkeypatch.setattr(gpu, "pipelined_seconds", lambda run, count: run() is not None and 0.5)
    rows = [row for part in gpu.first_card.PARTS for row in gpu.run_part(part, tiny=True)]
    figures = [row["figure"] for row in rows]
    assert {name: figures.count(name) for name in figures} == {
        "pool": 2, "attention": 4, "experts, quantized": 6, "copy of an expert": 3, "8 bytes to the host": 1,
        "experts": 2, "pinned memory": 2,
    }  # fmt: skip
    assert all(row["relative_error"] < 1e-5 for row in rows if row["figure"] == "attention")
    assert all(row["forward_ms"] == 500 for row in rows if "forward_ms" in row)
    sizes = gpu.first_card.TINY
    assert [row["bytes"] for row in rows if "bytes" in row] == [3 * 128 * 256 * bits // 8 for bits in (4, 8, 16)]
    assert all(row["pinned_bytes"] >= sizes.pinned_bytes and not row["error"] for row in rows if "error" in row)
    # All parts but one, which trains, are of this file.
    assert set(gpu.FIRST) == {*gpu.first_card.PARTS, "training"}


def test_first_card_in_the_log(gpu, monkeypatch, tmp_path, capsys):
    """The whole of `--first`, with parts that end, fail, or lack a GPU; a second run leaves the first file."""
    found = {
        "pool": ([{"figure": "pool", "bytes_limit": 2**30, "fraction": "0.93"}], None),
        "training": ([{"device": "GPU"}, {"job": "step", "seconds": 0.25, "predicted_seconds": 1234.5}], None),
    }
    asked = []

    def measure(part, tiny, deadline, changes):
        asked.append((part, dict(changes)))
        return found.get(part, ([], "timed out"))

    monkeypatch.setattr(gpu, "measure", measure)
    facts = {"device": "NVIDIA H200", "date": "2026-12-01", "versions": "jax 1", "driver": "580", "commit": "abc"}
    monkeypatch.setattr(gpu, "run_facts", lambda: facts)
    assert [gpu.measure_first(True, 0, tmp_path) for _ in range(2)] == [1, 1]
    assert [part for part, _ in asked[: len(gpu.FIRST)]] == list(gpu.FIRST)
    assert dict(asked)["pool by default"] == {"XLA_CLIENT_MEM_FRACTION": None}
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "2026-12-01-nvidia-h200-2.md",
        "2026-12-01-nvidia-h200.md",
    ]
    text = (tmp_path / "2026-12-01-nvidia-h200.md").read_text()
    for line in (
        "# 2026-12-01, NVIDIA H200: `python benchmarks/gpu.py --first`",
        "jax 1, driver 580, commit abc.",
        "| bytes_limit | fraction |",
        "| 1,073,741,824 | 0.93 |",
        "| job | seconds | predicted_seconds |",
        "| step | 0.25 | 1,234 |",
        "attention: timed out",
    ):
        assert line in text.splitlines()


def test_training_steps_of_the_benchmark(gpu):
    """An accumulated step runs twice on its own state; FLOPs and tokens grow with it, parameters do not."""
    config = SphinxConfig(DecoderConfig(32, 64, 1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=64), None)
    sizes = gpu.TINY._replace(training=(1, 16))
    (one, parameters), (two, same) = (gpu.train_job(config, sizes, "bfloat16", accum) for accum in (1, 2))
    two.run()
    two.run()
    assert (one.tokens, two.tokens) == (16, 32)
    assert two.flops == 2 * one.flops > 0 and two.planned_bytes > one.planned_bytes
    assert parameters == same == 2 * 64 * 32 + 32 * 4 * 24 + 32 * 32 + 4 * 3 * 32 * 64 + 32 * 4 + 3 * 32
    assert gpu.training_label(gpu.FULL, 8, "bfloat16") == "training step, 32,768 tokens, bfloat16 moments"


def test_attention_of_jax_and_torch(benchmark, monkeypatch, capsys):
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    attention = benchmark("attention")
    monkeypatch.setattr(attention, "SIZES", (("nano", 2, 70),))
    monkeypatch.setattr(sys, "argv", ["attention.py", "--quick"])
    attention.main()
    *_, forward, backward = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert forward[:3] == ["| nano", "2 x 70", "forward"]
    assert backward[:3] == ["| nano", "2 x 70", "forward and backward"]
    assert all(float(cell.strip(" |")) > 0 for row in (forward, backward) for cell in row[3:])


def test_convnext_of_jax_and_torch(benchmark, monkeypatch, capsys):
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    convnext = benchmark("convnext")
    monkeypatch.setattr(convnext, "CONFIG", ConvNextConfig(dims=(8, 16), image_size=64))
    monkeypatch.setattr(sys, "argv", ["convnext.py", "--quick"])
    convnext.main()
    *_, first, second = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert (first[:2], second[:2]) == (["| 8", "16 x 16"], ["| 16", "8 x 8"])
    assert all(float(cell.strip(" |")) > 0 for row in (first, second) for cell in row[2:])


@pytest.mark.slow
def test_overhead_of_a_mesh(benchmark, monkeypatch):
    """Each of two replicas computes half of the FLOPs, updates all parameters, and all-reduces its gradients."""
    mesh_scaling = benchmark("mesh_scaling")
    language = DecoderConfig(32, 64, 1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=64)
    monkeypatch.setattr(mesh_scaling, "CONFIG", SphinxConfig(language, None))
    monkeypatch.setattr(mesh_scaling, "BATCH_SIZE", 2)
    monkeypatch.setattr(mesh_scaling, "LENGTH", 16)
    monkeypatch.setattr(mesh_scaling, "REPETITIONS", 1)
    found = mesh_scaling.measure("data", 2, np.ones((2, 16), np.int32))
    parameters = 2 * 64 * 32 + 32 * 4 * 24 + 32 * 32 + 4 * 3 * 32 * 64 + 32 * 4 + 3 * 32
    # In float32, on both devices.
    assert found["collectives_mib"] == pytest.approx(2 * 4 * parameters / 2**20, rel=0.01)
    assert found["relative_flops"] == pytest.approx(1, abs=0.01)
    assert all(found[f"{part}_seconds"] > 0 for part in ("step", "one_device", "collectives"))


def test_the_peer_of_the_benchmarks_installs_without_torchvision():
    """torchvision's only build beside the pinned torch is for CUDA, and breaks transformers' import of Mixtral."""
    needed = [line for line in importlib.metadata.requires("sphinx-jax") or () if 'extra == "parity"' in line]
    names = {line.split("=")[0].split(">")[0].split(";")[0].strip() for line in needed}
    assert names == {"torch", "transformers", "peft", "safetensors", "gguf"}
