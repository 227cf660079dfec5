"""Shared by the entry points: option parsing, the compilation cache, and errors as one line."""

import contextlib
import dataclasses
import io
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import jax
import tyro

from sharding import LayoutError, fail, fail_with
from sphinx_jax.errors import UserError
from sphinx_jax.user_cache import cache_directory

Options = TypeVar("Options")

FLAGS = (tyro.conf.FlagCreatePairsOff,)
"""No --no-FLAG for a flag that is off by default."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Options of `--plan`, the same for training and inference."""

    plan: bool = False
    """Print whether it fits on --num-gpus GPUs of the kind --gpu, and exit. Needs no GPU."""
    gpu: str | None = None
    """With --plan: a100-40gb, a100-80gb, h100-80gb, h200, b200, l40s, a6000, a10g, l4, rtx3090, rtx4090, rtx4080, or
    a file mine.json that describes another GPU."""
    num_gpus: int | None = None
    """With --plan: number of GPUs; by default the size of the mesh."""
    gpus_per_host: int | None = None
    """With --plan: GPUs of a host, by default 8; what passes between more of them goes over the network."""
    sweep: bool = False
    """With --plan: compare all meshes of --num-gpus GPUs (for training also remat and batch sizes), best first."""
    json: bool = False
    """With --plan: print one JSON object instead of tables."""

    @property
    def gpu_name(self) -> str:
        """--gpu. Raises UserError without it."""
        if self.gpu is None:
            raise UserError("--plan needs a GPU: give --gpu, for example --gpu a100-80gb")
        return self.gpu

    def check(self) -> None:
        """Raises UserError on options that exclude each other or are out of range."""
        given = [name for name in ("gpu", "num_gpus", "gpus_per_host", "sweep", "json") if getattr(self, name)]
        if not self.plan and given:
            raise UserError(f"--{given[0].replace('_', '-')} belongs to --plan; add it")
        if self.plan:
            _ = self.gpu_name
        for flag, number in (("--num-gpus", self.num_gpus), ("--gpus-per-host", self.gpus_per_host)):
            if number is not None and number < 1:
                raise UserError(f"{flag} must be 1 or more, got {number}")


NO_PLAN = PlanOptions()


@overload
def parse(kind: type[Options], argv: Sequence[str], program: str, description: str) -> Options: ...


@overload
def parse(kind: Any, argv: Sequence[str], program: str, description: str) -> Any: ...


def parse(kind: Any, argv: Sequence[str], program: str, description: str) -> Any:
    """The options in `argv` as an instance of `kind`, a dataclass or a union of them.

    `--help` prints and exits. Raises UserError if `argv` cannot be parsed.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=list(argv), prog=program, description=description, config=FLAGS)
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro prints a box, drawn with spaces where the terminal has no box characters: title, problem, rule, help.
    lines = [line.strip("│ ") for line in captured.getvalue().splitlines()[1:]]
    problem = itertools.takewhile(_has_text, itertools.dropwhile(lambda line: not _has_text(line), lines))
    raise UserError(f"{' '.join(problem) or 'the options could not be parsed'}; see {program} --help")


def _has_text(line: str) -> bool:
    return line.strip("─-╰╯") != ""


def enable_compilation_cache() -> None:
    """Cache compiled programs on disk, those that took a tenth of a second or more to compile.

    In JAX_COMPILATION_CACHE_DIR if that is set, else in the user's cache directory, if there is one.
    """
    configured: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]  # dynamic
    if configured is None and (directory := cache_directory()):
        jax.config.update("jax_compilation_cache_dir", str(directory))
    # Not jax's second: a start of the server compiles dozens of programs, of a small model in half a second each.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def divert_native_stdout() -> None:
    """Redirect what native code writes to standard output to standard error; Python's `sys.stdout` is unchanged.

    Gloo, the collectives library of processes without GPUs, prints its peers to file descriptor 1, in the middle of
    lines that Python writes.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper) or sys.stderr is None:
        # Closed by the parent process, or replaced by something that is not a file.
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    line_buffering, write_through = sys.stdout.line_buffering, sys.stdout.write_through
    sys.stdout = io.TextIOWrapper(
        os.fdopen(stdout, "wb", 0 if write_through else -1),
        sys.stdout.encoding,
        sys.stdout.errors,
        line_buffering=line_buffering,
        write_through=write_through,
    )


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of `main(argv)`: 2 after an error that the user caused, printed as the last line of stderr.

    One of several processes ends any other error with such a line too, after the stack trace, and with code 1.
    """
    try:
        return main(argv)
    except (UserError, LayoutError) as error:
        return fail(2, "error: " + " ".join(str(error).splitlines()))
    except KeyboardInterrupt:
        return fail(130)
    except BrokenPipeError:
        # The reader of standard output has gone. Python would report the error again when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return fail(1)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        return fail_with(error)
