"""Matrix-vector products for one CPU in C++, compiled on the machine that runs them.

XLA:CPU has no product that reads a matrix in its stack, or its integers, with more than one thread, and converts
bfloat16 number by number. Where there is no C++ compiler, callers use XLA's programs.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import sharding
from sphinx_jax.kernels.quantized import Quantized, Weight
from sphinx_jax.user_cache import cache_directory

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cc")

COMPILERS = "c++", "g++", "clang++"

FLAGS = "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared"

MIN_BYTES = 2**18
"""Of a matrix. Of smaller ones, as those of `nano`, XLA's loops read each in less time than a call takes."""

_STORED_DTYPES = jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8
"""Of weights, of int8 values and of packed int4 values."""

_loading = threading.Lock()


def runs_natively(x: Array, w: Weight) -> bool:
    """Whether `native_matvecs` takes these, with w[n, in, *out]: on one CPU with its library, and large matrices.

    Simulated devices run XLA's programs, like the devices that they stand for.
    """
    if sharding.platform() != "cpu" or sharding.device_count() > 1 or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    values = w.values if isinstance(w, Quantized) else w
    if values.nbytes < MIN_BYTES * len(values) or values.dtype not in _STORED_DTYPES:
        return False
    return has_library()


def native_matvecs(x: Float[Array, "rows in"], w: Weight, index: Int[Array, "rows"]) -> Float[Array, "rows *out"]:
    """x[r] @ w[index[r]] for each row, with w[n, in, *out], accumulated in float32; the stored weights are read."""
    quantization = (w.scales, w.steps, w.zeros) if isinstance(w, Quantized) else ()
    values = w.values if isinstance(w, Quantized) else w
    arrays = [array.reshape(*array.shape[:2], -1) for array in (values, *quantization) if array is not None]
    packed = 2 if isinstance(w, Quantized) and w.dtype == "int4" else 1
    result = jax.ShapeDtypeStruct((len(x), packed * arrays[0].shape[2]), jnp.float32)
    call = jax.ffi.ffi_call("sphinx_matvec", result, vmap_method="sequential")
    y = call(x.astype(jnp.float32), arrays[0], index.astype(jnp.int32), *arrays[1:])
    return y.reshape(len(x), *w.shape[2:]).astype(x.dtype)


def has_library() -> bool:
    """Whether the products can be called. The first call compiles them, unless an earlier process did."""
    with _loading:
        return _load()


@functools.cache
def _load() -> bool:
    try:
        path = _compiled()
        if path is None:
            log.info("no C++ compiler: products of a few tokens run in XLA's loops; apt-get install g++ speeds them up")
            return False
        target = ctypes.CDLL(str(path)).SphinxMatvec
    except subprocess.CalledProcessError as error:
        log.warning(
            "products of a few tokens run in XLA's slower loops, since the C++ compiler failed:\n%s", error.stderr
        )
        return False
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a directory that can be written, and CXX to a compiler"
        log.warning("products of a few tokens run in XLA's slower loops (%s); %s", error, remedy)
        return False
    jax.ffi.register_ffi_target("sphinx_matvec", jax.ffi.pycapsule(target), platform="cpu")
    return True


def _compiled() -> Path | None:
    """The library for this CPU, in the user's cache. None without a compiler.

    Raises CalledProcessError if the compiler fails, OSError if the cache cannot be written.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    command = [*shlex.split(compiler), *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE)]
    identity = "\n".join((*command, SOURCE.read_text(), importlib.metadata.version("jaxlib"), _cpu_features()))
    folder = cache_directory()
    if folder is None:
        raise OSError("no home directory")
    library = folder / f"matvec-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            # Other processes may do the same: each puts a whole library in place.
            built = Path(temporary) / library.name
            subprocess.run([*command, "-o", built], check=True, capture_output=True, text=True)
            built.replace(library)
        log.info("compiled %s in %.1f s", library, time.monotonic() - started)
    return library


def _cpu_features() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^(flags|Features)\s*:.*", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found.group() if found else platform.processor()
