"""Smoke tests of the benchmarks: gpu.py without a GPU, others at tiny size."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import pytest

from sphinx_jax.config import DecoderConfig, SphinxConfig


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    yield importlib.import_module
    for name in ("attention", "gpu", "jobs", "mesh_scaling", "peer"):
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
        "| decode, batch 1 | 500.00 | 64 | 0.70 | 1500.00 | 3.00 |",
        "| prefill 512 |  |  |  | 250.00 |  |",
        "| inference | 4.00 |  |",
        "| 8 | dense (default) | 500.000 | 12.0 | 1000.000 | 18.0 |",
        "training: out of memory",
    ):
        assert line in text.splitlines()
    assert "22 layers for inference, no for training" in text


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
    assert names == {"torch", "transformers", "safetensors"}
