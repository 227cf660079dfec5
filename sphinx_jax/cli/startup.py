"""Process-wide setup of an entry point, before jax is imported. Importing this module has no effect.

jax's CUDA plugin logs on every start that it finds no CUDA driver, and fails with a stack trace where only its compiler
is installed (`--plan` on a machine without a GPU). Both are expected there. And on a CPU, memory that goes back to the
kernel between two steps costs more than it is worth.
"""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path

from sphinx_jax.allocator import set_memory_fraction
from sphinx_jax.memory_plan.native_stderr import drop_no_driver_messages

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def prepare_process() -> None:
    """Give XLA most of each GPU; restrict jax to the CPU where its CUDA plugin is installed without a CUDA driver.

    The user's own settings have precedence. Call it before anything imports jax.
    """
    set_memory_fraction()
    if _has_driver():
        return
    # Threads keep the arena that they begin with, and other arenas than the first map large blocks in any case.
    _set_malloc({_M_ARENA_MAX: 1})
    if importlib.util.find_spec("jax_plugins") is None:
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


def keep_freed_memory() -> None:
    """Make malloc keep what is freed from now on, on a machine without a GPU.

    XLA allocates the temporaries of a program anew for each call. By default malloc maps blocks of that size and unmaps
    them when they are freed, so that each training step faults on every page of them, and the kernel zeroes it. Call it
    once the weights are loaded: what is freed while they are read is better given back.
    """
    if not _has_driver():
        _set_malloc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def _set_malloc(options: dict[int, int]) -> None:
    """Set options of glibc's malloc. Without glibc, or with MALLOC_* or GLIBC_TUNABLES of the user, nothing is set."""
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    is_set |= "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if is_set or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in options.items():
        mallopt(option, value)


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
