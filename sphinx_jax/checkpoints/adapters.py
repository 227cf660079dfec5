"""Adapters of a given base from a directory of their own: a LoRA run, or what PEFT saved."""

import dataclasses
import logging
from pathlib import Path

from sphinx_jax.checkpoints import lora
from sphinx_jax.checkpoints.formats import peft
from sphinx_jax.checkpoints.source import Adapters, CheckpointSource
from sphinx_jax.errors import UserError

log = logging.getLogger(__name__)


def read_adapters(path: Path, base: CheckpointSource) -> Adapters:
    """The adapters in a LoRA run or a PEFT directory, for the model of `base`.

    Raises UserError if there are none, or if they do not fit the model's sizes. Logs a warning if a run's adapters were
    trained on another checkpoint, which may be this one in another format.
    """
    if lora.is_lora(path):
        info = lora.read_adapter_info(path)
        if lora.fingerprint(base) != info.fingerprint:
            log.warning("%s holds adapters of %s, and it cannot be told that %s is it", path, info.base, base.path)
        return lora.read_run(path, base.config)
    if peft.is_peft(path):
        return peft.read(path, base.config.language)
    raise UserError(
        f"{path} holds no adapters: neither lora.json (a run of train.py --stage lora) nor adapter_config.json (PEFT)"
    )


def with_adapters(base: CheckpointSource, path: Path) -> CheckpointSource:
    """The base, into whose matrices the adapters in `path` are merged on load. Raises UserError if it is quantized."""
    if base.quantized:
        raise UserError(
            f"{base.path} is quantized to {base.quantized}: adapters are merged into an unquantized base; give the "
            "checkpoint that it was converted from"
        )
    return dataclasses.replace(base, adapters=(*base.adapters, read_adapters(path, base)))
