"""The memory of a training step on this CPU, as the operating system counts it, against its plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[2]

STEPS = [{}, {"remat": "block"}, {"grad_accum_steps": 4}]


@pytest.mark.slow
def test_remat_and_accumulation_change_memory_as_planned(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-m", "tests.instruments.step_memory", json.dumps(STEPS)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    base, *others = map(json.loads, done.stdout.splitlines())
    for step in (base, *others):
        # A plan lacks thread-local buffers and what malloc retains; and a buffer may not be touched to its end.
        assert abs(step["measured"] - step["planned"]) < base["planned"] / 10
    for options, step in zip(STEPS[1:], others, strict=True):
        saved = base["planned"] - step["planned"]
        assert saved > base["planned"] / 2
        assert base["measured"] - step["measured"] == pytest.approx(saved, rel=0.1), options
