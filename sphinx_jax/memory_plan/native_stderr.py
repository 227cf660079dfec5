"""Dropping what native code writes to standard error while a compiler for absent GPUs is set up."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def silence_native_stderr() -> Iterator[None]:
    """Within the block, what libraries write to file descriptor 2 is dropped. An exception is still raised."""
    if sys.stderr is None:
        yield  # closed by whoever started this process
        return
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
