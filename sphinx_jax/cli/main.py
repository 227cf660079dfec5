"""The console script: `sphinx-jax COMMAND ...`, one command for each script at the root of the repository."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model, or plan a training step (--plan)",
    "infer": "answer a question, a chat or a file of questions",
    "export": "write the weights of one of a run's checkpoints",
    "convert": "convert and inspect checkpoints",
}


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run the command `name` of COMMANDS with the arguments `argv`; the exit code."""
    # Before jax is imported by the command's own modules.
    from sphinx_jax.cli.startup import prepare_process

    prepare_process()
    from sphinx_jax.cli.common import run

    return run(importlib.import_module(f"sphinx_jax.cli.{name}").main, argv)


def main() -> None:
    """Parse the command's name, run it, and exit with its code."""
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
