"""What the entry points share: options from the command line, and errors as one line."""

import contextlib
import dataclasses
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import tyro

from sharding import LayoutError
from sphinx_jax.errors import UserError

Options = TypeVar("Options")

FLAGS = (tyro.conf.FlagCreatePairsOff,)
"""A switch that is off has no second spelling for staying off."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Options of `--plan`, the same for training and inference."""

    plan: bool = False
    """Say whether it would fit on --num-gpus cards of the kind --gpu, and do nothing else. No GPU is needed."""
    gpu: str | None = None
    """With --plan: a100-40gb, a100-80gb, h100-80gb, h200, b200, l40s, a6000, a10g, l4, rtx3090, rtx4090, rtx4080, or
    a file mine.json that describes yours."""
    num_gpus: int | None = None
    """With --plan: how many cards; by default as many as the mesh has devices."""
    sweep: bool = False
    """With --plan: try the meshes for so many cards (in training also recomputation and batch sizes), best first."""
    json: bool = False
    """With --plan: print one JSON object instead of a table."""

    def check(self) -> None:
        """Raises UserError on options that do not go together."""
        given = [name for name in ("gpu", "num_gpus", "sweep", "json") if getattr(self, name)]
        if not self.plan and given:
            raise UserError(f"--{given[0].replace('_', '-')} belongs to --plan; add it")
        if self.plan and self.gpu is None:
            raise UserError("--plan needs a card: give --gpu, for example --gpu a100-80gb")
        if self.num_gpus is not None and self.num_gpus < 1:
            raise UserError(f"--num-gpus must be 1 or more, got {self.num_gpus}")


NO_PLAN = PlanOptions()


def parse(kind: type[Options], argv: Sequence[str], program: str, description: str) -> Options:
    """The options in `argv`, a dataclass. `--help` prints and exits; raises UserError on what does not parse."""
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            return tyro.cli(kind, args=list(argv), prog=program, description=description, config=FLAGS)
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro draws a box, of spaces where the terminal has no lines: a title, what is wrong, a rule, help.
    lines = [line.strip("│ ") for line in drawn.getvalue().splitlines()[1:]]
    is_text = lambda line: line.strip("─-╰╯") != ""
    problem = " ".join(itertools.takewhile(is_text, itertools.dropwhile(lambda line: not is_text(line), lines)))
    raise UserError(f"{problem or 'the options could not be read'}; see {program} --help")


def keep_compiled_programs() -> None:
    """Programs that took a second or more to compile are kept for the next start.

    In JAX_COMPILATION_CACHE_DIR if that is set, else under the user's cache directory.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "sphinx-jax"))


def only_answers_on_stdout() -> None:
    """From now on standard output is Python's alone; what libraries print there from C++ goes to standard error.

    Gloo, over which processes without GPUs speak, tells there whom it found, in the middle of any line of ours.
    """
    if sys.stdout is None or sys.stderr is None:
        # Closed by whoever started this: there is nothing to keep apart.
        return
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    at_once, by_lines = sys.stdout.write_through, sys.stdout.line_buffering
    file = os.fdopen(own, "wb", 0 if at_once else -1)
    sys.stdout = io.TextIOWrapper(
        file, sys.stdout.encoding, sys.stdout.errors, line_buffering=by_lines, write_through=at_once
    )


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of main(argv): 2 after an error that is the user's to mend, told on the last line of stderr."""
    try:
        return main(argv)
    except (UserError, LayoutError) as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
