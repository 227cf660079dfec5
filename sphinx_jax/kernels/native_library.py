"""The library of C++ kernels for one CPU, compiled on the machine that runs them and called through jax's FFI.

XLA:CPU has no product that reads a matrix in its stack, or its integers, with more than one thread, converts bfloat16
number by number, and reads a KV cache to its end. Where there is no C++ compiler, callers use XLA's programs.
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

import sharding
from sphinx_jax.user_cache import cache_directory

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cc")

HEADERS = tuple(SOURCE.with_name(f"native_{name}.h") for name in ("common", "integers", "matvec", "attention"))

COMPILERS = "c++", "g++", "clang++"

FLAGS = "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared"

_TARGETS = {"sphinx_matvec": "SphinxMatvec", "sphinx_decode_attention": "SphinxDecodeAttention"}

_loading = threading.Lock()


def has_native_kernels() -> bool:
    """Whether the target is one CPU that has the library. The first call compiles it, unless an earlier process did.

    Several simulated devices run XLA's programs, like the devices that they stand for.
    """
    return sharding.platform() == "cpu" and sharding.device_count() == 1 and has_library()


def has_library() -> bool:
    """Whether the kernels can be called."""
    with _loading:
        return _load()


@functools.cache
def _load() -> bool:
    try:
        path = _compiled()
        if path is None:
            log.info("no C++ compiler: decode steps run in XLA's loops; apt-get install g++ speeds them up")
            return False
        library = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        log.warning("decode steps run in XLA's slower loops, since the C++ compiler failed:\n%s", error.stderr)
        return False
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a directory that can be written, and CXX to a compiler"
        log.warning("decode steps run in XLA's slower loops (%s); %s", error, remedy)
        return False
    for name, symbol in _TARGETS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return True


def _compiled() -> Path | None:
    """The library for this CPU, in the user's cache. None without a compiler.

    Raises CalledProcessError if the compiler fails, OSError if the cache cannot be written.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    command = [*shlex.split(compiler), *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE)]
    sources = (file.read_text() for file in (SOURCE, *HEADERS))
    identity = "\n".join((*command, *sources, importlib.metadata.version("jaxlib"), _cpu_features()))
    folder = cache_directory()
    if folder is None:
        raise OSError("no home directory")
    library = folder / f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
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
