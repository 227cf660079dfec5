"""Process-wide setup of an entry point, before jax is imported. Importing this module has no effect.

jax's CUDA plugin logs on every start that it finds no CUDA driver, and fails with a stack trace where only its compiler
is installed (`--plan` on a machine without a GPU). Both are expected there.
"""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path

from sphinx_jax.memory_plan.native_stderr import drop_no_driver_messages


def prepare_process() -> None:
    """Restrict jax to the CPU where its CUDA plugin is installed and there is no CUDA driver.

    The user's JAX_PLATFORMS has precedence. Call it before anything imports jax.
    """
    if importlib.util.find_spec("jax_plugins") is None or _has_driver():
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Whatever is loaded here logs "no CUDA driver" once, now and not later: the plugin's extension modules, with the
    # Pallas kernels for Hopper GPUs, and the plugin itself, which jax loads even for JAX_PLATFORMS=cpu.
    with drop_no_driver_messages():
        import jax.experimental.pallas.mosaic_gpu  # noqa: F401

        for library in _plugin_libraries():
            # jax reports a plugin that cannot be loaded.
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library))


def _plugin_libraries() -> list[Path]:
    """The shared libraries of the installed CUDA plugins."""
    specs = [importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)]
    folders = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    return [file for folder in folders for file in folder.glob("xla_cuda_plugin.so")]


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
