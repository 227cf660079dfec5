"""A script of this project in two processes of two simulated devices each, started as a user would."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import sphinx_jax


def in_two(script: Path, *argv: Any) -> tuple[list[tuple[str, str]], list[int]]:
    """What either says on its standard output, and on standard error, once both have ended; and the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = [sys.executable, script, "--checkpoint", sphinx_jax.SHIPPED, "--max-model-len", "256", *argv]
    program += ["--dtype", "float32", "--mesh.data", "2", "--mesh.tensor", "2", "--simulate-devices", "2"]
    program += ["--coordinator", address, "--num-processes", "2", "--process-id"]
    started = [
        subprocess.Popen(
            [*map(str, program), str(i)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=240) for process in started]
    return said, [process.returncode for process in started]
