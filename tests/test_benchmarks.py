"""benchmarks/gpu.py where it can be checked without a GPU: which model fits a card, and the report of what was run."""

import sys
from pathlib import Path

import pytest

from sphinx_jax.config import DecoderConfig


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    yield pytest.importorskip("gpu")
    for name in ("gpu", "jobs"):
        sys.modules.pop(name)


def test_layers_that_fit(gpu):
    """All 46.7 billion parameters in bfloat16 on an H200, fewer layers on an H100 and in training."""
    layers = lambda memory, width: gpu.layers_that_fit(DecoderConfig(), memory, width).num_layers
    assert layers(0.93 * 141e9, 2) == 32
    # A layer has 1.45 billion parameters, embedding and head 0.26.
    assert layers(0.93 * 80e9, 2) == (0.93 * 80e9 - 8e9 - 2 * 0.262e9) // (2 * 1.4512e9)
    assert layers(0.93 * 80e9, 20) == 2
    assert layers(1e9, 2) == 1


def test_a_report_joins_both_sides_and_leaves_empty_what_was_not_run(gpu):
    found = {part: [] for part in gpu.PARTS}
    found["inference"] = [
        {"device": "card", "flops": 7e14, "bandwidth": 3e12},
        {"layers": 22},
        {"job": "decode, batch 1", "seconds": 0.5, "tokens": 32, "share": 0.7},
        {"memory": {"inference": {"planned": 2**32, "peak": None}}},
    ]
    found["transformers"] = [{"job": "decode, batch 1", "theirs_s": 1.5}, {"job": "prefill 512", "theirs_s": 0.25}]
    found["experts"] = [
        {"tokens": 8, "form": "every", "usual": True, "flops": 6e12, "forward_s": 0.5, "gradient_s": 1.0}
    ]
    result = gpu.report(found, {"training": "out of memory"})
    assert result["jobs"][0]["ratio"] == 3
    text = gpu.markdown(result | {"date": "today", "versions": "jax", "commit": "abc"})
    for line in (
        "| decode, batch 1 | 500.00 | 64 | 0.70 | 1500.00 | 3.00 |",
        "| prefill 512 |  |  |  | 250.00 |  |",
        "| inference | 4.00 |  |",
        "| 8 | every (usual) | 500.000 | 12.0 | 1000.000 | 18.0 |",
        "training: out of memory",
    ):
        assert line in text.splitlines()
    assert "22 layers to answer, no to train" in text
