"""On a CPU, the temporaries of training steps are not mapped anew each time."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """measure(mode, **environment): page faults of six training steps, measured in a process of their own."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")), "JAX_PLATFORMS": "cpu"}
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def run(mode: str, **environment: str) -> list[int]:
        argv = [sys.executable, "-m", "tests.instruments.page_faults", "small", "24", mode]
        done = subprocess.run(argv, cwd=ROOT, env=own | cache | environment, capture_output=True, text=True, check=True)
        return [json.loads(line)["faults"] for line in done.stdout.splitlines()]

    return run


@pytest.mark.slow
def test_training_steps_reuse_their_memory(measure):
    """At least ten times fewer faults than as malloc is by default; the user's own settings win."""
    default, *kept = measure("both")
    # Blocks of over 64 MiB, which malloc maps unless they are of its first arena.
    assert default > 6 * 2**26 / resource.getpagesize()
    # A heap may grow in measured steps by chance: 0 or a step's faults were seen. The best of four counts.
    assert min(kept) < default / 10
    for name, value in (("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")):
        assert measure("keep", **{name: value})[0] > default / 2
