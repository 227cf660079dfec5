"""What an entry point does to its process before jax starts. Importing this module does nothing.

jax's CUDA plugin reports, on every start, that it finds no driver, and fails with a stack trace where it is installed
for its compiler alone (`--plan` on a machine without a GPU). Nothing is wrong then.
"""

import ctypes
import importlib.util
import os

from sphinx_jax.memory_plan.native_stderr import silence_native_stderr


def prepare_process() -> None:
    """Keep jax on the CPU where its CUDA plugin is installed and there is no GPU. A user's JAX_PLATFORMS stays.

    Call it before anything imports jax.
    """
    if importlib.util.find_spec("jax_plugins") is None or _has_driver():
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with silence_native_stderr():
        # The kernels for Hopper GPUs import a part of jax that looks for CUDA again.
        import jax.experimental.pallas.mosaic_gpu  # noqa: F401


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
