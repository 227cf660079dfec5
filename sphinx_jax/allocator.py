"""What XLA's allocators give out on a GPU: a fraction of its memory, and pinned host memory up to a limit.

XLA reads both from environment variables when jax makes its first backend, so entry points set them before that. The
user's own settings have precedence. Importing this module has no effect, and it does not import jax.
"""

import math
import os
import re
from pathlib import Path

from sphinx_jax.errors import UserError

GIB = 2**30

MEMORY_FRACTION = 0.93
"""Of the memory that CUDA reports, XLA's pool; jax's default is 0.75. The rest is for what is allocated past the pool:
CUDA context, loaded kernels, NCCL. 0.93 was run on an H200 (benchmarks/gpu.py)."""

VISIBLE_FRACTION = 0.98
"""Of the driver's figure (nvidia-smi), the memory that CUDA reports: 23.64 of 23.99 GiB on an RTX 4090, 15.70 of 15.99
on an RTX 4080, 79.1 of 79.65 on an H100, as out-of-memory messages of PyTorch state. The least of them."""

_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""jax reads either, and raises ValueError if both are set (jaxlib/xla_client.py)."""

_HOST_LIMIT_VARIABLE, _DEFAULT_HOST_LIMIT_GIB = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64
"""In GiB, in spite of its name (XLA, GetGpuHostAllocator)."""

_HOST_LIMIT_MARGIN = 1.05
"""Limit of pinned memory over what is stored there: rounding, and buffers of transfers."""


def set_memory_fraction() -> None:
    """Make XLA take MEMORY_FRACTION of each GPU, unless the user has set a fraction."""
    if not any(os.environ.get(name) for name in _FRACTION_VARIABLES):
        os.environ[_FRACTION_VARIABLES[0]] = str(MEMORY_FRACTION)


def memory_fraction() -> float:
    """The fraction of each GPU that XLA takes: the user's, or MEMORY_FRACTION. Raises UserError if it is no number."""
    for name in _FRACTION_VARIABLES:
        if value := os.environ.get(name):
            try:
                return float(value)
            except ValueError:
                raise UserError(f"{name}={value} is no number; give a fraction such as {MEMORY_FRACTION}") from None
    return MEMORY_FRACTION


def pool_bytes(memory_bytes: int) -> int:
    """What XLA can allocate on a GPU of which the driver reports `memory_bytes`."""
    return int(memory_fraction() * VISIBLE_FRACTION * memory_bytes)


def set_host_limit(pinned_bytes: int) -> None:
    """Make XLA give out `pinned_bytes` of pinned host memory and little more, unless the user has set a limit.

    Not all of the host's memory: XLA's pool grows by doubling, and pins up to the limit.
    """
    if not os.environ.get(_HOST_LIMIT_VARIABLE):
        os.environ[_HOST_LIMIT_VARIABLE] = str(math.ceil(_HOST_LIMIT_MARGIN * pinned_bytes / GIB) + 1)


def check_pinned_memory(pinned_bytes: int, platform: str) -> None:
    """Raises UserError if `pinned_bytes` exceed the host's free memory or, on a GPU, the limit of pinned memory."""
    free = free_host_bytes()
    if free is not None and pinned_bytes > free:
        raise UserError(
            f"--offload keeps {pinned_bytes / GIB:.1f} GiB in host memory, of which {free / GIB:.1f} GiB are free; use "
            "--quantize int8 or int4, or a machine with more memory"
        )
    if platform != "cpu" and pinned_bytes > (limit_gib := _host_limit_gib()) * GIB:
        needed = math.ceil(_HOST_LIMIT_MARGIN * pinned_bytes / GIB) + 1
        raise UserError(
            f"XLA pins up to {limit_gib} GiB of host memory, and offload needs {pinned_bytes / GIB:.1f}; set "
            f"{_HOST_LIMIT_VARIABLE}={needed} before jax starts"
        )


def _host_limit_gib() -> int:
    value = os.environ.get(_HOST_LIMIT_VARIABLE) or str(_DEFAULT_HOST_LIMIT_GIB)
    if not value.isdigit():
        raise UserError(f"{_HOST_LIMIT_VARIABLE}={value} is no number of GiB; give one such as 64")
    return int(value)


def free_host_bytes() -> int | None:
    """Free memory of this machine, or of its container if that has a limit; None where Linux does not say."""
    sizes = [size for size in (_mem_available(), _container_limit()) if size is not None]
    return min(sizes, default=None)


def _mem_available() -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _container_limit() -> int | None:
    """Of the control group (cgroup v2)."""
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return int(limit) if limit.isdigit() else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
