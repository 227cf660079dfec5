"""`python -m sphinx_jax.checkpoints`: see `sphinx_jax.cli.convert`."""

import sys

from sphinx_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("convert", sys.argv[1:]))
