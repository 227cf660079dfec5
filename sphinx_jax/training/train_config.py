"""The train config: what changes the numbers or the memory of a run, besides the model and the data."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from jax.sharding import Mesh
from jaxtyping import Array

from sphinx_jax.config import LoraConfig
from sphinx_jax.errors import UserError
from sphinx_jax.training.moments import Moments
from sphinx_jax.training.optimizer import Stage, cosine_with_warmup

ComputeDtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "block", "dots"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Master weights and accumulated gradients are float32, whatever the compute dtype `dtype`."""

    steps: int
    batch_size: int = 64
    grad_accum_steps: int = 1
    lr: float = 3e-3
    min_lr: float = 0.0
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    aux_loss_weight: float = 0.0
    stage: Stage = "all"
    lora: LoraConfig | None = None
    """The adapters of the stage "lora"."""
    remat: Remat = "none"
    """Rematerialisation in the backward pass: none; each layer; each layer except its matrix products."""
    sequence_parallel: bool = False
    """Sequence parallelism: the residual stream is sharded along the sequence (`sharding.SEQUENCE_PARALLEL_RULES`)."""
    dtype: ComputeDtype = "float32"
    moments: Moments = "float32"
    seed: int = 0


def schedule(train_config: TrainConfig) -> Callable[[int | Array], Array]:
    """Learning rate by optimizer step, from 0. The warm-up starts one step ahead, so that step 0 is not wasted."""
    # A run no longer than the warm-up ends within it.
    end = max(train_config.steps, train_config.warmup_steps + 1)
    return lambda step: cosine_with_warmup(
        step + 1, lr=train_config.lr, min_lr=train_config.min_lr, warmup_epochs=train_config.warmup_steps, epochs=end
    )


def check_batch(train_config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless each microbatch divides over the data-parallel devices of the mesh."""
    batch_size, accum_steps = train_config.batch_size, train_config.grad_accum_steps
    data_parallel = mesh.shape["data"] * mesh.shape["fsdp"]
    multiple = accum_steps * data_parallel
    if batch_size % multiple:
        nearest = max(batch_size // multiple, 1) * multiple
        raise UserError(
            f"--batch-size {batch_size} does not divide into --grad-accum-steps {accum_steps} microbatches over "
            f"{data_parallel} devices of data x fsdp; try --batch-size {nearest}"
        )
