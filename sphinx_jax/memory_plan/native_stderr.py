"""Filter the messages that native code writes to standard error while jax's CUDA plugin is loaded without a GPU."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

_NO_DRIVER_MESSAGES = (
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    b"Could not find cuda drivers on your machine, GPU will not be used",
)
"""Each extension module of the CUDA plugin logs these when it is loaded on a machine without a CUDA driver."""


@contextlib.contextmanager
def drop_no_driver_messages() -> Iterator[None]:
    """Within the block, drop the "no CUDA driver" messages written to file descriptor 2.

    All other output is written to standard error when the block ends. Exceptions propagate.
    """
    if sys.stderr is None:
        # The process was started with a closed file descriptor 2.
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured:
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured:
                if not any(message in line for message in _NO_DRIVER_MESSAGES):
                    os.write(2, line)
