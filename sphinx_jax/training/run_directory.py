"""The run directory: whether it may be used, and the files written to it before the first step."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from sharding import barrier, is_primary_process
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import lora
from sphinx_jax.checkpoints.assets import has_tokenizer, read_assets
from sphinx_jax.config import LoraConfig
from sphinx_jax.errors import UserError
from sphinx_jax.training.train_config import TrainConfig


def choose(out: Path | None, preset: str) -> Path:
    """`out`, by default runs/PRESET-DATE. Raises UserError with several processes, which need one common directory."""
    if out is None and jax.process_count() > 1:
        raise UserError("several processes need --out, one directory that all of them share")
    return out or Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def check(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises UserError where `out` must not be used, before anything is read or written."""
    is_run = (out / "options.json").is_file()
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    if resume and not is_run:
        raise UserError(f"--resume: {out} holds no run; give the run directory with --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())) or resume:
        return
    if not is_run:
        raise UserError(f"--out {out} exists and is not a run directory; choose another directory")
    if not overwrite:
        raise UserError(f"--out {out} holds a run already; continue it with --resume or replace it with --overwrite")


def check_resume(out: Path, preset: str, train_config: TrainConfig, base: Path | None) -> None:
    """Raises UserError where the run to resume was started with options that give its train state other shapes.

    A LoRA run needs the same adapters on the same checkpoint `base`, quantized alike.
    """
    options = json.loads((out / "options.json").read_text())
    started = options | options["train"]
    for name, value in (("preset", preset), ("stage", train_config.stage), ("moments", train_config.moments)):
        if started[name] != value:
            raise UserError(f"--resume: {out} was started with --{name} {started[name]}, not {value}; give the same")
    if train_config.lora is None:
        return
    info = lora.read_adapter_info(out)
    if info.lora != train_config.lora:
        flags, given_flags = map(_lora_flags, (info.lora, train_config.lora))
        raise UserError(f"--resume: {out} was started with {flags}, not with {given_flags}; give the same")
    if info.quantize != train_config.quantize:
        flags, given_flags = (
            f"with --quantize {q}" if q else "without --quantize" for q in (info.quantize, train_config.quantize)
        )
        raise UserError(f"--resume: {out} was started {flags}, not {given_flags}; give the same")
    if base is not None and lora.fingerprint(checkpoints.open(base)) != info.fingerprint:
        raise UserError(f"--resume: {out} adapts {info.base}, and --init {base} is another checkpoint")


def check_data(out: Path, fingerprint: str) -> None:
    """Raises UserError where the run to resume was started on other data (`Task.fingerprint`)."""
    started = json.loads((out / "options.json").read_text()).get("data_fingerprint", fingerprint)
    if started != fingerprint:
        raise UserError(
            f"--resume: the data has changed since {out} was started; restore it, or train on from its weights with "
            f"--init {out} and another --out"
        )


def _lora_flags(config: LoraConfig) -> str:
    return f"--lora-rank {config.rank} --lora-alpha {config.alpha:g} --lora-target-modules {config.target_modules}"


def prepare(out: Path, options: dict[str, Any], overwrite: bool) -> None:
    """Create `out`, empty unless resuming, and write the options: the primary process, after all have checked it."""
    barrier("run directory checked")
    if is_primary_process():
        if overwrite and out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "options.json").write_text(json.dumps(options, indent=2, default=str) + "\n")
    barrier("run directory created")


def tokenizer_files(out: Path, resume: bool) -> dict[str, bytes] | None:
    """The tokenizer of a run to resume, if it was written yet: one trained on data that has changed would differ."""
    assets = read_assets(out) if resume else {}
    return assets if has_tokenizer(assets) else None
