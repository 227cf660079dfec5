"""The directory of a run: never overwritten without being asked to."""

import json
import shutil
from pathlib import Path
from typing import Any

from sphinx_jax.errors import UserError


def check_run_directory(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises UserError before anything is read or written where `out` must not be used."""
    is_run = (out / "options.json").is_file()
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    if resume and not is_run:
        raise UserError(f"--resume: {out} holds no run; give the run's directory with --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())) or resume:
        return
    if not is_run:
        raise UserError(f"--out {out} exists and is not a run; choose another directory")
    if not overwrite:
        raise UserError(f"--out {out} holds a run already; continue it with --resume or replace it with --overwrite")


def prepare_run_directory(out: Path, options: dict[str, Any], overwrite: bool) -> None:
    """Make `out`, empty where it is replaced, and write down what was asked for."""
    if overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "options.json").write_text(json.dumps(options, indent=2, default=str) + "\n")
