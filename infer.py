"""Script for `python infer.py` from a checkout; the command itself is `sphinx_jax/cli/infer.py`."""

import sys

from sphinx_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("infer", sys.argv[1:]))
