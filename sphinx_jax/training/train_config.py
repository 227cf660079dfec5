"""The train config: what changes the numbers or the memory of a run, besides the model and the data."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from sphinx_jax.config import LoraConfig, LoraTargets
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.quantized import QuantizedDtype
from sphinx_jax.training.moments import Moments
from sphinx_jax.training.optimizer import Stage

ComputeDtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "block", "dots"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training. Master weights and accumulated gradients are always float32."""

    steps: int = 900
    """Optimizer steps."""
    batch_size: int = 64
    """Global batch size: sequences per optimizer step, over all devices."""
    grad_accum_steps: int = 1
    """Gradient accumulation: microbatches per optimizer step."""
    lr: float = 3e-3
    """Peak learning rate of a cosine schedule with linear warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    warmup_steps: int = 100
    """Warm-up steps."""
    weight_decay: float = 0.05
    """AdamW weight decay; biases and norm scales are excluded."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; larger ones are clipped."""
    stage: Stage = "all"
    """Trainable parameters. all: every parameter; mm_stage2: all but the vision encoders; mm_stage1: the projection of
    the image embeddings and the image start and end vectors; language: the decoder; lora: LoRA adapters on the frozen
    --init (docs/fine-tuning.md)."""
    lora_rank: int | None = None
    """Rank of the LoRA adapters; 8 by default."""
    lora_alpha: float | None = None
    """LoRA scaling: the product of the factors is multiplied by alpha / rank; twice the rank by default."""
    lora_target_modules: LoraTargets | None = None
    """Matrices with a LoRA adapter: attention, or all, the experts included; all by default."""
    quantize: QuantizedDtype | None = None
    """With --stage lora: quantize the frozen matrices of attention, experts and head as they are read, to a half or a
    third of bfloat16's memory (docs/fine-tuning.md)."""
    dtype: ComputeDtype = "float32"
    """Compute dtype. Master weights are always float32."""
    remat: Remat = "none"
    """Rematerialisation (activation checkpointing) in the backward pass. none; block: each layer; dots: each layer
    except its matrix products."""
    sequence_parallel: bool = False
    """Sequence parallelism: shard the residual stream along the sequence over the tensor and expert axes. Saves
    activation memory; all-reduces become reduce-scatters and all-gathers of the same volume. The sequence length should
    be a multiple of tensor x expert."""
    moments: Moments = "float32"
    """AdamW moments. float32: 8 bytes per parameter; bfloat16: 4; factored: first moment in bfloat16, second factored
    as in Adafactor, 2 (docs/training-runs.md)."""
    seed: int = 0
    """Random seed of initialisation, data order and augmentation."""

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters of the stage "lora"."""
        rank = self.lora_rank or 8
        config = LoraConfig(rank, self.lora_alpha or 2.0 * rank, self.lora_target_modules or "all")
        return config if self.stage == "lora" else None


def schedule(train_config: TrainConfig) -> Callable[[Any], Array]:
    """Learning rate by optimizer step, from 0. The warm-up starts one step ahead, so that step 0 is not wasted."""
    # A run no longer than the warm-up ends within it.
    end = max(train_config.steps, train_config.warmup_steps + 1)
    cosine = optax.warmup_cosine_decay_schedule(
        0.0, train_config.lr, train_config.warmup_steps, end, train_config.min_lr
    )
    return lambda step: jnp.asarray(cosine(step + 1))


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
