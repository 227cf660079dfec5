"""How a model of the published sizes is trained where no flag says it: as the original's scripts do.

Sources, in LLaMA2-Accessory: SPHINX/README.md (commit 3349f96), whose script fine-tunes a SPHINX model on images and
recommends a learning rate of 5e-6 for SPHINX-MoE; accessory/exps/finetune/sg/dialog_ultrachat200kWizardcode_
mixtralSparse.sh (commit cf85a3b) for Mixtral without images. Both run on 32 GPUs as four data-parallel groups.
"""

from typing import NamedTuple

from sphinx_jax.config import SphinxConfig
from sphinx_jax.training.optimizer import Stage
from sphinx_jax.training.train_config import TrainConfig

MIN_EXPERT_PARAMETERS = 10**9
"""Models with fewer parameters in their experts (nano, mixtral-140m) keep the defaults of `TrainConfig`."""

TEXT_TOKENS = 512
"""The original's --max_words for images. It counts image tokens there: with five crops, 1,455, no answer is left."""

LORA_LR = 1e-4
"""QLoRA's for 33 and 65 billion parameters (https://arxiv.org/abs/2305.14314, table 9). The original trains norms and
biases with its adapters, with a learning rate of 2e-5."""

SEQUENCES_PER_GROUP = 4
"""The original's --batch_size: sequences of a microbatch in each data-parallel group."""


class Recipe(NamedTuple):
    """Values of the options of `train.py`."""

    train_config: TrainConfig
    epochs: float
    warmup_epochs: float
    max_length: int


def recipe(config: SphinxConfig, stage: Stage | None = None) -> Recipe | None:
    """The recipe of a model in `stage` (None: the original's); None for a small one, which has none."""
    language = config.language
    expert_parameters = 3 * language.num_layers * language.num_experts * language.dim * language.hidden_dim
    if expert_parameters < MIN_EXPERT_PARAMETERS:
        return None
    has_images = config.vision is not None
    train_config = TrainConfig(
        batch_size=64 if has_images else 128,
        lr=LORA_LR if stage == "lora" else 5e-6,
        weight_decay=0.0,
        clip_norm=8.0 if has_images else 2.0,
        stage=stage or ("mm_stage2" if has_images else "all"),
        dtype="bfloat16",
        remat="block",
    )
    if not has_images:
        return Recipe(train_config, epochs=1.0, warmup_epochs=0.1, max_length=4096)
    return Recipe(train_config, epochs=1.0, warmup_epochs=0.03, max_length=config.num_image_tokens + TEXT_TOKENS)


def microbatches(train_config: TrainConfig, data_parallel: int) -> int:
    """Gradient accumulation steps with at most the original's sequences in each of the data-parallel groups.

    One sequence with a quantized base, which is for GPUs that have little memory left.
    """
    largest = 1 if train_config.quantize else SEQUENCES_PER_GROUP
    local = max(train_config.batch_size // data_parallel, 1)
    return next((n for n in range(-(-local // largest), local + 1) if local % n == 0), 1)
