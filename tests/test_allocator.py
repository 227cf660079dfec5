"""What XLA may allocate: settings before jax's first backend, the capacity of plans, pinned host memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

import sphinx_jax
from sphinx_jax import UserError, allocator, checkpoints
from sphinx_jax.config import preset
from sphinx_jax.hardware import GPUS
from sphinx_jax.inference.pinned_memory import pinned_bytes

ROOT = Path(__file__).parent.parent

NEW, OLD, LIMIT = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"

COMMAND = f"""
import json, os, sys
from jaxlib import xla_client

def make_cpu_client(*args, **kwargs):
    print(json.dumps({{name: os.environ[name] for name in {(NEW, OLD, LIMIT)} if name in os.environ}}), flush=True)
    os._exit(0)

xla_client.make_cpu_client = make_cpu_client
from sphinx_jax.cli.main import run_command
run_command("infer", sys.argv[1:])
"""
"""`infer.py` up to jax's first backend, when XLA reads the environment."""

QUESTION = ["--checkpoint", str(sphinx_jax.SHIPPED), "--prompt", "?"]


@pytest.mark.parametrize(
    ("given", "argv", "expected"),
    [
        ({}, [], {NEW: "0.93"}),
        ({OLD: "0.5"}, ["--offload"], {OLD: "0.5", LIMIT: "2"}),
        ({NEW: "0.8", LIMIT: "100"}, ["--offload"], {NEW: "0.8", LIMIT: "100"}),
    ],
    ids=["defaults", "the deprecated name", "all of the user's"],
)
def test_entry_points_set_what_the_user_has_not(given, argv, expected):
    """jax raises ValueError if both names of the fraction are set."""
    environment = {name: value for name, value in os.environ.items() if name not in (NEW, OLD, LIMIT)}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *QUESTION, *argv],
        cwd=ROOT, env=environment | given, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("name", GPUS)
def test_capacity_is_what_xla_can_allocate(name, monkeypatch):
    gpu = GPUS[name]
    monkeypatch.delenv(NEW, raising=False)
    monkeypatch.delenv(OLD, raising=False)
    assert 0.91 * gpu.memory_bytes < gpu.pool_bytes < 0.92 * gpu.memory_bytes
    monkeypatch.setenv(OLD, "0.5")
    assert gpu.pool_bytes == pytest.approx(0.49 * gpu.memory_bytes, abs=1)
    monkeypatch.setenv(OLD, "half")
    with pytest.raises(UserError, match=f"{OLD}=half is no number"):
        _ = gpu.pool_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "bytes_per_weight"), [(None, 2), ("int4", 0.5 + 2 / 32)])
def test_pinned_bytes_of_sphinx_moe(quantize, bytes_per_weight):
    """The experts, 45.1 billion parameters, and 3.4 billion of the encoders, on one device or in eighths."""
    one, eight = (AbstractMesh((1, 1, 1, n), ("data", "fsdp", "expert", "tensor")) for n in (1, 8))
    config = preset("sphinx-moe")
    expected = 32 * 8 * 3 * 4096 * 14336 * bytes_per_weight + 2 * (50_103_211_392 - 46_702_792_704)
    assert pinned_bytes(config, one, "bfloat16", quantize) == pytest.approx(expected, rel=2e-3)
    assert pinned_bytes(config, eight, "bfloat16", quantize) == pytest.approx(expected / 8, rel=2e-3)


def test_memory_and_limit_are_checked(monkeypatch):
    gib = 2**30
    # Empty is not set; and this is undone after the test.
    monkeypatch.setenv(LIMIT, "")
    monkeypatch.setattr(allocator, "_read", lambda path: "MemAvailable: 104857600 kB\n" if "meminfo" in path else "max")
    assert allocator.free_host_bytes() == 100 * gib
    allocator.check_pinned_memory(87 * gib, "cpu")
    with pytest.raises(UserError, match=rf"pins up to 64 GiB .* needs 87\.0; set {LIMIT}=93"):
        allocator.check_pinned_memory(87 * gib, "gpu")
    allocator.set_host_limit(87 * gib)
    assert os.environ[LIMIT] == "93"
    allocator.check_pinned_memory(87 * gib, "gpu")
    monkeypatch.setenv(LIMIT, "no")
    with pytest.raises(UserError, match="is no number of GiB"):
        allocator.check_pinned_memory(87 * gib, "gpu")
    monkeypatch.setattr(allocator, "_read", lambda path: str(50 * gib) if "cgroup" in path else "")
    with pytest.raises(UserError, match=r"keeps 87.0 GiB in host memory, of which 50.0 GiB are free"):
        allocator.check_pinned_memory(87 * gib, "cpu")
    monkeypatch.setattr(allocator, "_read", lambda path: "")
    allocator.check_pinned_memory(87 * gib, "cpu")


def test_a_host_that_is_too_small_is_found_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(allocator, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr(checkpoints, "load", lambda *args, **kwargs: pytest.fail("read the weights"))
    with pytest.raises(UserError, match=r"of which 0\.0 GiB are free; use --quantize"):
        sphinx_jax.load(sphinx_jax.SHIPPED, offload=True)
