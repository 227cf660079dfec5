"""Where compiled programs are kept from one process to the next."""

import os
from pathlib import Path


def cache_directory() -> Path | None:
    """`sphinx-jax` under XDG_CACHE_HOME or ~/.cache. None for a user without a home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sphinx-jax"
    except RuntimeError:
        return None
