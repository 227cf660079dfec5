"""Starting an entry point on a machine without a GPU: silent, and no real error hidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sphinx_jax.cli import startup
from sphinx_jax.memory_plan.native_stderr import drop_no_driver_messages

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[2]

LOADED = """
from sphinx_jax.cli.startup import prepare_process
prepare_process()
import jax
import flax, orbax.checkpoint
assert jax.devices()[0].platform == "cpu"
"""


def test_start_is_silent(needs_gpu_compiler):
    """With the CUDA plugin and without a driver, loading jax's extension modules and the plugin logs nothing."""
    if startup._has_driver():
        pytest.skip("this machine has a CUDA driver")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    argv = [sys.executable, "-c", LOADED]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_messages_and_errors_pass(capfd):
    with pytest.raises(OSError, match="real"), drop_no_driver_messages():
        os.write(2, b"W0000 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU will not be used.\n")
        os.write(2, b"E0000 real.cc:1] a real error\n")
        print("from Python", file=sys.__stderr__)
        raise OSError("a real exception")
    assert capfd.readouterr().err == "E0000 real.cc:1] a real error\nfrom Python\n"
