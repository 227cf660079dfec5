"""The console script `sphinx-jax COMMAND ...`. The scripts at the root of the repository run the same commands."""

import gc
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = {
    "train": "train a model, or plan a training step (--plan)",
    "infer": "answer one question, chat, or answer a file of questions",
    "serve": "serve a model: an OpenAI-compatible API, and a page in the browser",
    "evaluate": "evaluate a model on benchmarks",
    "convert": "convert and inspect checkpoints, and write those of a run as models",
}


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run the command `name` of COMMANDS with the arguments `argv`; returns the exit code."""
    # Modules are no garbage: looking for it while they are imported, and again at exit, takes a fifth of the start.
    gc.disable()
    # Before the modules of the command import jax.
    from sphinx_jax.cli.startup import prepare_process

    prepare_process()
    from sphinx_jax.cli.common import run

    # Imported within `run`: a command may find that packages of its extra are missing.
    return run(lambda argv: _imported(name).main(argv), argv)


def _imported(name: str) -> ModuleType:
    """The module of a command; garbage is collected from here on, among what comes after."""
    try:
        return importlib.import_module(f"sphinx_jax.cli.{name}")
    finally:
        gc.freeze()
        gc.enable()


def main() -> None:
    """Run the command that the first argument names, and exit with its code."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.exit(run_command(name, argv))
    usage = "usage: sphinx-jax COMMAND [OPTIONS]\n\ncommands:\n" + "".join(
        f"  {command:10} {text}\n" for command, text in COMMANDS.items()
    )
    if name in ("-h", "--help"):
        print(usage + "\nsphinx-jax COMMAND --help shows the options of a command")
        sys.exit(0)
    print(f"error: unknown command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)
