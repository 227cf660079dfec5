"""The weights of one checkpoint of a run, written as a model (`sphinx-jax convert RUN DIR --step N`)."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import lora, reader
from sphinx_jax.checkpoints.assets import Assets, read_assets, write_assets
from sphinx_jax.checkpoints.formats import peft
from sphinx_jax.config import SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.model import SphinxMoE


def write_description(run: Path, config: SphinxConfig, tokenizer_files: Assets) -> None:
    """Write the model config and the tokenizer of a run that starts; its checkpoints hold arrays only."""
    (run / "model.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    write_assets(run, tokenizer_files)


def read_description(run: Path) -> tuple[SphinxConfig, Assets]:
    """Inverse of `write_description`. Raises UserError if `run` is not a run's directory."""
    try:
        config = SphinxConfig.from_dict(json.loads((run / "model.json").read_text()))
        return config, read_assets(run)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run} is not a run's directory, or a damaged one: {error}; give the directory of --out"
        ) from error


def is_unfinished_run(path: Path) -> bool:
    """Whether a directory is a run with checkpoints and without final weights."""
    return (path / "checkpoints").is_dir() and not any((path / name).is_dir() for name in ("params", "adapters"))


def choose_step(run: Path, step: int | None) -> int:
    """`step`, or the newest one if None. Raises UserError that lists the run's checkpoints."""
    folder = run / "checkpoints"
    saved = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
    if not saved:
        raise UserError(f"{run} has no checkpoints; give the directory of a run, or leave out --step")
    if step not in (None, *saved):
        raise UserError(
            f"--step {step} is not among the checkpoints of {run}; choose one of {', '.join(map(str, saved))}"
        )
    return saved[-1] if step is None else step


def read_weights(run: Path, step: int, config: SphinxConfig, mesh: Mesh, dtype: str | None = None) -> dict[str, Any]:
    """The parameters of a checkpoint on `mesh`, adapters merged into their base; no optimizer state is read.

    `dtype` None: as stored by the run.
    """
    state = (run / "checkpoints" / str(step) / "state").absolute()
    if lora.is_lora(run):
        return reader.load(lora.open_directory(run, checkpoints.open, state), mesh, dtype, unstacked=False).params
    _, abstract = sharding.abstract_params(lambda rngs: SphinxMoE(config, rngs=rngs), mesh, dtype=dtype)
    target = {
        "params": {
            "model": jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), abstract)
        }
    }
    request = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(state, args=request)["params"]["model"]


def export_step(
    run: Path, destination: Path, step: int | None, format: str, shards: int | None = None, dtype: str | None = None
) -> int:
    """Write the weights of a run's checkpoint (None: the newest) as a model of any format; returns its step.

    Raises UserError if `run` has no such checkpoint, or as `checkpoints.save` does.
    """
    config, tokenizer_files = read_description(run)
    checkpoints.check_destination(destination)
    step = choose_step(run, step)
    weights = read_weights(run, step, config, sharding.make_mesh(), dtype)
    checkpoints.save(destination, config, weights, tokenizer_files, format, shards)
    return step


def export_adapters(run: Path, destination: Path, step: int | None, dtype: str | None = None) -> Path:
    """Write the adapters of a LoRA run, or of one of its checkpoints, as PEFT does; returns the base that they adapt.

    `step` None: the final adapters, or the newest checkpoint of an unfinished run. `dtype` None: float32. Raises
    UserError if `run` is no LoRA run or has no such checkpoint, or if `destination` is not empty.
    """
    checkpoints.check_destination(destination)
    if not lora.is_lora(run):
        raise UserError(f"{run} holds no adapters to write for PEFT; give a run of train.py --stage lora")
    is_of_step = step is not None or is_unfinished_run(run)
    state = (run / "checkpoints" / str(choose_step(run, step)) / "state").absolute() if is_of_step else None
    opened = lora.open_directory(run, checkpoints.open, state)
    base = lora.read_adapter_info(run).base
    peft.write(destination, opened.config.language, opened.adapters[-1], base, dtype)
    return base
