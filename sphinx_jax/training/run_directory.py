"""The directory that a run writes: when it may be used, and what stands in it from the start."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from sharding import barrier, is_primary_process
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import lora
from sphinx_jax.config import LoraConfig
from sphinx_jax.errors import UserError


def choose(out: Path | None, preset: str) -> Path:
    """`out`, or else runs/PRESET-DATE. Raises UserError where several processes would each choose their own."""
    if out is None and jax.process_count() > 1:
        raise UserError("several processes need --out, one directory that all of them see")
    return out or Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def check(out: Path, resume: bool, overwrite: bool) -> None:
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


def check_same(out: Path, options: dict[str, Any]) -> None:
    """Raises UserError where the run to be resumed was begun with options that give its state another shape."""
    begun = json.loads((out / "options.json").read_text())
    for name in ("preset", "stage", "moments"):
        if begun[name] != options[name]:
            raise UserError(
                f"--resume: {out} was begun with --{name} {begun[name]}, not {options[name]}; give the same"
            )


def check_adapters(out: Path, adapters: LoraConfig | None, base: Path | None) -> None:
    """Raises UserError where the run to be resumed has not these adapters (None: none) of the checkpoint `base`."""
    recorded = lora.read_record(out) if lora.is_lora(out) else None

    def said(it: LoraConfig | None) -> str:
        if it is None:
            return "no adapters"
        sizes = f"--lora-rank {it.rank} --lora-alpha {it.alpha:g}"
        return f"--stage lora {sizes} --lora-target-modules {it.target_modules}"

    begun = recorded and recorded.lora
    if begun != adapters:
        raise UserError(f"--resume: {out} was begun with {said(begun)}, not with {said(adapters)}; give the same")
    if recorded and lora.fingerprint(checkpoints.open(base)) != recorded.fingerprint:
        raise UserError(f"--resume: {out} adapts {recorded.base}, and --init {base} is another checkpoint")


def prepare(out: Path, options: dict[str, Any], overwrite: bool) -> None:
    """Make `out`, empty unless resuming, and write down what was asked for: one process, once all have looked at it."""
    barrier("looked at the run directory")
    if is_primary_process():
        if overwrite and out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "options.json").write_text(json.dumps(options, indent=2, default=str) + "\n")
    barrier("made the run directory")


def tokenizer_bytes(out: Path, resume: bool) -> bytes | None:
    """The tokenizer of a run to be resumed, if it has come so far: data that has changed since would give another."""
    file = out / "tokenizer.model"
    return file.read_bytes() if resume and file.exists() else None
