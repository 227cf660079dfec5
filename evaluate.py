"""Script for `python evaluate.py` from a checkout; the command itself is `sphinx_jax/cli/evaluate.py`."""

import sys

from sphinx_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", sys.argv[1:]))
