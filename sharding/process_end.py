"""How a process of several ends: with one sentence as its last word, and without waiting for processes that are gone.

jax ends a process from native code, with a stack trace, when its coordination service reports that another process is
gone; the kernel kills one without asking. Nothing in such a process can print anything: a shell that outlives it does.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from typing import IO, NoReturn

import jax

SHUTDOWN_SECONDS = 10.0
"""How long a process that failed waits for the others to end with it. jax would wait five minutes."""

_SCRIPT = """trap "" HUP INT TERM
word=$1
while read -r line; do word=$line; done
test -z "$word" || printf "%s\\n" "$word" >&2
"""
"""The loop ends at the end of file: when the process that holds the other end of the pipe is gone."""

_pipe: IO[bytes] | None = None
_ending = threading.RLock()
"""Of two threads that end the process the first has the last word."""


def report_sudden_end(process_id: int, num_processes: int) -> None:
    """Let a shell print one sentence if this process ends by neither Python's exit nor a function of this module."""
    global _pipe
    word = (
        f"error: process {process_id} of {num_processes}, on {socket.gethostname()}, was killed, or jax ended it "
        "because another process is gone or cannot be reached; start all processes again, train.py with --resume"
    )
    arguments = ["sh", "-c", _SCRIPT, "sh", word]
    _pipe = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL).stdin
    atexit.register(_end)


def _end() -> None:
    # Here, not in jax's own exit handler, which comes later: it too may end the process with a stack trace.
    jax.distributed.shutdown()
    _set_last_word("")


def _set_last_word(word: str) -> None:
    """What the shell prints when this process is gone: one line, or nothing."""
    if _pipe is not None:
        # The shell may have been killed.
        with contextlib.suppress(OSError):
            _pipe.write(f"{word}\n".encode())
            _pipe.flush()


def exit_now(code: int, word: str = "") -> NoReturn:
    """End this process at once, whatever its threads wait for, with `word` as the last line of standard error."""
    _ending.acquire()
    # Nobody may be left to read it.
    with contextlib.suppress(OSError):
        stderr = os.dup(2)
        # Other threads, those of native code too, print no more. What they are in the middle of comes first.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if word:
            time.sleep(0.05)
            os.write(stderr, f"{word}\n".encode())
    _set_last_word("")
    os._exit(code)


def fail(code: int, word: str = "") -> int:
    """Print the last word of a process and return its exit code. One of several processes ends here instead.

    It gives the others SHUTDOWN_SECONDS to come to the same end, and does not run what libraries do at the exit.
    """
    if _pipe is None:
        if word:
            print(word, file=sys.stderr, flush=True)
        return code
    _ending.acquire()
    _set_last_word(word)
    ending = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    ending.start()
    ending.join(SHUTDOWN_SECONDS)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    exit_now(code, word)


def fail_with(error: Exception) -> int:
    """`fail` by an error that no user caused, most often of a collective whose other end is gone."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return fail(1, f"error: on {socket.gethostname()}: {reason}; start all processes again, train.py with --resume")
