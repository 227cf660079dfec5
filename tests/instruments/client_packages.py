"""Programs of others that talk to a server, each installed into a folder of its own: their dependencies differ."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

INSTALL_SECONDS = 400

_UNREACHABLE = ("Retrying (Retry", "Temporary failure in name resolution", "Network is unreachable")


def install(folder: Path, *requirements: str) -> Path:
    """`folder`, with the packages in it. Skips the test if there is no pip, or PyPI cannot be reached."""
    # Few of the modules are ever imported; those are compiled then.
    options = ["--quiet", "--disable-pip-version-check", "--no-warn-conflicts", "--no-compile"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *requirements],
        capture_output=True, text=True, timeout=INSTALL_SECONDS,
    )  # fmt: skip
    if done.returncode and any(reason in done.stderr for reason in (*_UNREACHABLE, "No module named pip")):
        pytest.skip(f"cannot install {' '.join(requirements)}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


def start(packages: Path, argv: Sequence[object], folder: Path | None = None, **variables: str) -> subprocess.Popen:
    """A Python program that sees `packages` and the standard library, and nothing of this project."""
    return subprocess.Popen(
        # -S: without the packages of this interpreter.
        [sys.executable, "-S", *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(packages)} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def run(packages: Path, argv: Sequence[object], given: str = "", folder: Path | None = None, **variables: str) -> str:
    """What such a program prints, once it has ended well."""
    process = start(packages, argv, folder, **variables)
    try:
        said, complaints = process.communicate(given, timeout=INSTALL_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, said + complaints
    return said
