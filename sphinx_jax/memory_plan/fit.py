"""Whether a training step fits on the GPUs of this machine, asked before weights are read; and if not, what would."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from sharding import bytes_per_device
from sphinx_jax.config import SphinxConfig
from sphinx_jax.errors import UserError
from sphinx_jax.hardware import GIB
from sphinx_jax.memory_plan.aot import memory_analysis
from sphinx_jax.memory_plan.report import RESERVE_BYTES
from sphinx_jax.memory_plan.training import BatchShapes, abstract_batch
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig


def device_capacity(mesh: Mesh) -> int:
    """Bytes that the allocator of a GPU of `mesh` may give out."""
    stats: Any = mesh.local_devices[0].memory_stats()
    return stats["bytes_limit"]


def check_fits(
    config: SphinxConfig, train_config: TrainConfig, mesh: Mesh, batch_shapes: BatchShapes, capacity: int
) -> None:
    """Raises UserError if a step on such a batch needs more than `capacity` bytes of a device; it names the nearest
    settings that do not.

    The step is compiled, and read from the compilation cache when the run compiles it again.
    """
    needed = functools.partial(bytes_needed, config, mesh=mesh, batch_shapes=batch_shapes, capacity=capacity)
    least = needed(train_config)
    if least <= capacity:
        return
    problem = (
        f"a training step needs {least / GIB:.1f} GiB of each of {mesh.size} GPUs or more, which have "
        f"{capacity / GIB:.1f}"
    )
    for smaller in _smaller(train_config, mesh):
        try:
            size = needed(smaller)
        except UserError:
            # The mesh splits a quantized group.
            continue
        if size <= capacity:
            raise UserError(f"{problem}; {_changes(train_config, smaller)} fits, with {size / GIB:.1f} GiB")
    raise UserError(
        f"{problem}, and adapters on an int4 base do not fit either: use more GPUs, which python train.py --plan "
        "--num-gpus N counts without them"
    )


def bytes_needed(
    config: SphinxConfig, train_config: TrainConfig, *, mesh: Mesh, batch_shapes: BatchShapes, capacity: int
) -> int:
    """Bytes of the step on each device; of its arguments alone where these exceed `capacity`: then nothing is
    compiled.
    """
    program = train_program(config, train_config, mesh)
    args = (program.state, abstract_batch(batch_shapes, mesh), program.frozen_params)
    arguments = bytes_per_device(args) + RESERVE_BYTES
    if arguments > capacity:
        return arguments
    return memory_analysis(program.step.compile(args, mesh)).total + RESERVE_BYTES


def _smaller(train_config: TrainConfig, mesh: Mesh) -> Iterator[TrainConfig]:
    """Settings that need less memory, the nearest first: smaller microbatches, then smaller moments, then adapters, and
    those on a quantized base.
    """
    replace = dataclasses.replace
    least = train_config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    if train_config.grad_accum_steps < least:
        train_config = replace(train_config, grad_accum_steps=least)
        yield train_config
    if train_config.stage != "lora":
        if train_config.moments == "float32":
            yield replace(train_config, moments="factored")
        train_config = replace(train_config, stage="lora")
        yield train_config
    for kind in ("int8", "int4"):
        if train_config.quantize is None or (train_config.quantize, kind) == ("int8", "int4"):
            yield replace(train_config, quantize=kind)


def _changes(given: TrainConfig, smaller: TrainConfig) -> str:
    """The flags of the fields that differ."""
    pairs = ((name, value) for name, value in vars(smaller).items() if getattr(given, name) != value)
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in pairs)
