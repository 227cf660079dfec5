"""Importing jax quietly where its CUDA plugin is installed for planning and there is no GPU.

The plugin remarks on every import that it finds no driver, and fails with a traceback when jax starts, although
nothing is wrong: only its compiler is wanted there (see `sharding.plan`).
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _has_plugin() -> bool:
    return importlib.util.find_spec("jax_plugins") is not None


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """What libraries write to standard error from C++ in here is dropped. An exception is still one."""
    if sys.stderr is None:
        yield  # closed by whoever started this
        return
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        os.close(nowhere)


if _has_plugin() and not _has_driver():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with without_remarks():
        # The kernels for Hopper GPUs load a part of jax that looks for CUDA again.
        import jax.experimental.pallas.mosaic_gpu  # noqa: F401
