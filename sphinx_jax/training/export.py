"""Writes the weights of one of a run's checkpoints as a model that `infer.py --checkpoint` takes.

python -m sphinx_jax.training.export runs/mine best --step 800
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import lora, reader
from sphinx_jax.config import SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.model import SphinxMoE


def write_description(run: Path, config: SphinxConfig, tokenizer_bytes: bytes) -> None:
    """What a checkpoint needs beside its arrays to become a model, written when a run begins."""
    (run / "model.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    (run / "tokenizer.model").write_bytes(tokenizer_bytes)


def read_description(run: Path) -> tuple[SphinxConfig, bytes]:
    """Inverse of `write_description`. Raises UserError where `run` is no run."""
    try:
        config = SphinxConfig.from_dict(json.loads((run / "model.json").read_text()))
        return config, (run / "tokenizer.model").read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is not the directory of a run, or a damaged one: {error}") from error


def choose_step(run: Path, step: int | None) -> int:
    """`step`, or the newest. Raises UserError that says which checkpoints there are."""
    folder = run / "checkpoints"
    saved = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
    if not saved or step not in (None, *saved):
        there = ", ".join(map(str, saved)) or "none"
        raise UserError(f"--step {'' if step is None else step}: not among the checkpoints of {run}; there are {there}")
    return saved[-1] if step is None else step


def read_weights(run: Path, step: int, config: SphinxConfig, mesh: Mesh) -> dict[str, Any]:
    """The model's parameters of a checkpoint on `mesh`, adapters added to their base; no optimizer state is read."""
    state = (run / "checkpoints" / str(step) / "state").absolute()
    if lora.is_lora(run):
        return reader.load(lora.open_directory(run, checkpoints.open, state), mesh, None, unstacked=False).params
    _, abstract = sharding.abstract_params(lambda rngs: SphinxMoE(config, rngs=rngs), mesh)
    described = lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding)
    target = {"params": {"model": jax.tree.map(described, abstract)}}
    request = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(state, args=request)["params"]["model"]
