"""FLOPs of a step against plain sums, and MFU in the log."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import sharding
from sphinx_jax.config import preset
from sphinx_jax.training import metrics
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig
from sphinx_jax.training.utilisation import peak_flops, step_flops

pytestmark = pytest.mark.optimized

METRICS = {"loss": 1.0, "accuracy": 0.5, "balance_loss": 1.0, "grad_norm": 1.0, "lr": 1e-3}


@pytest.mark.parametrize(("stage", "passes"), [("all", 3), ("mm_stage1", 2)])
def test_step_flops(stage, passes):
    """Mixtral-8x7B: twice the active parameters per token, and attention; the backward pass costs twice the forward.

    Rematerialisation counts in a plan, not in MFU.
    """
    config, mesh = preset("mixtral-8x7b"), sharding.make_mesh(fsdp=2, tensor=4)
    train_config = TrainConfig(steps=1, batch_size=4, remat="block", stage=stage)
    program = train_program(config, train_config, mesh)
    attention = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096
    weights = 32 * (attention + 2 * 3 * 4096 * 14336 + 4096 * 8) + 4096 * 32000
    forward = 4 * 2048 * (2 * weights + 32 * 4 * 2048 * 4096)
    assert step_flops(program, 2048, False).total == pytest.approx(passes * forward, rel=1e-12)
    planned = step_flops(program, 2048, False, include_remat=True).total
    assert planned == pytest.approx((passes + 1) * forward, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "dtype", "each"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("NVIDIA H100 PCIe", "bfloat16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peak_flops_is_none_where_unknown(kind, dtype, each):
    assert peak_flops(kind, 4, dtype) == (each and 4 * each)


@pytest.mark.parametrize("peak", [1000.0, None])
def test_logged_throughput(tmp_path, monkeypatch, capsys, peak):
    """Two steps of 300 FLOPs in two seconds; and memory where the device reports it."""
    clock = iter([10.0, 12.0, 12.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30} if peak else None)
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [device])
    with metrics.RunLog(tmp_path, 2, peak_flops=peak) as log:
        log.count(1, 100, 0, 300.0)
        log.count(2, 100, 0, 300.0)
        log.write(2, METRICS)
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    stderr = capsys.readouterr().err
    assert record["tokens_per_second"] == 100
    if peak:
        assert record["mfu"] == 0.3 and record["memory_bytes"] == 3 * 2**30
        assert "MFU 30.0%" in stderr and "memory 3.0 GiB" in stderr
    else:
        assert not {"mfu", "memory_bytes"} & set(record)
        assert "MFU" not in stderr and "memory" not in stderr


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_tensorboard_log_does_not_import_torch(tmp_path):
    code = "import sys; from pathlib import Path; from sphinx_jax.training.metrics import RunLog; "
    code += "RunLog(Path(sys.argv[1]), 1); print('torch' in sys.modules, 'tensorboardX' in sys.modules)"
    root, cpu = Path(__file__).parents[2], os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, env=cpu, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert list((tmp_path / "tensorboard").iterdir())
