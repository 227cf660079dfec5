"""How to train: what changes the numbers or the memory of a run, besides the model and the data."""

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
    """Master weights and gradients' sums are float32, whatever `dtype` the model computes in."""

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
    """What is computed again for the gradient: nothing; each layer; each layer but its matrix products."""
    sequence_parallel: bool = False
    """The residual stream is split along the sequence between blocks (`sharding.SEQUENCE_PARALLEL_RULES`)."""
    dtype: ComputeDtype = "float32"
    moments: Moments = "float32"
    seed: int = 0


def schedule(train_config: TrainConfig) -> Callable[[int | Array], Array]:
    """Learning rate by optimizer step. Step 0 already learns: the warm-up is taken one step ahead."""
    # A run no longer than the warm-up ends in it.
    end = max(train_config.steps, train_config.warmup_steps + 1)
    return lambda step: cosine_with_warmup(
        step + 1, lr=train_config.lr, min_lr=train_config.min_lr, warmup_epochs=train_config.warmup_steps, epochs=end
    )


def check_batch(train_config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless each part of the batch divides over the mesh."""
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = train_config.grad_accum_steps * replicas
    if train_config.batch_size % parts:
        near = max(train_config.batch_size // parts, 1) * parts
        raise UserError(
            f"--batch-size {train_config.batch_size} does not divide into --grad-accum-steps {train_config.grad_accum_steps} parts over "
            f"{replicas} devices of data x fsdp; try --batch-size {near}"
        )
