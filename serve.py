"""Script for `python serve.py` from a checkout; the command itself is `sphinx_jax/cli/serve.py`."""

import sys

from sphinx_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("serve", sys.argv[1:]))
