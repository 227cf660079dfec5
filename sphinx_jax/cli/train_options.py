"""The options of `train.py`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sharding import NO_PROCESSES, MeshShape, Processes
from sphinx_jax.cli.common import NO_PLAN, PlanOptions
from sphinx_jax.data.tasks import YamlOptions
from sphinx_jax.errors import UserError
from sphinx_jax.training.profile import parse_steps
from sphinx_jax.training.train_config import TrainConfig
from sphinx_jax.training.trainer import RunConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a model and write a run directory that `infer.py --checkpoint` takes.

    The defaults here are for small models. Models of the published sizes are trained as the original does where no
    option says otherwise: the run prints its settings (docs/fine-tuning.md).
    """

    preset: str = "nano"
    """Model preset: nano, mixtral-140m, sphinx-tiny, sphinx-mini, mixtral-8x7b, sphinx-moe or sphinx-moe-1k."""
    init: Path | None = None
    """Checkpoint to start from, in any format; random initialisation by default."""
    adapters: Path | None = None
    """Adapters of --init to start from: a LoRA run, or a directory of PEFT. With --stage lora they are trained on, in
    their own rank; with another stage they are merged into --init."""
    data: str = "easy-vqa"
    """Training data: easy-vqa, or a data.yaml that lists files of conversations (docs/data.md)."""
    yaml: Annotated[YamlOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=YamlOptions)
    max_skipped: float = 0.01
    """data.yaml: largest fraction of records to skip, malformed or with unreadable images, before the run stops."""
    validation_split: bool = False
    """easy-vqa: evaluate on a tenth of the training images, held out, instead of on the test set."""
    aux_loss_weight: float = 1.0
    """easy-vqa: weight of the auxiliary probe loss on the shape and colour in each image; 0 disables it."""
    out: Path | None = None
    """Run directory to write; runs/PRESET-DATE by default."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainConfig)
    epochs: float | None = None
    """Epochs over the training data, instead of --steps."""
    warmup_epochs: float | None = None
    """Epochs of warm-up, instead of --warmup-steps."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RunConfig)
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    """Devices along each mesh axis; one device by default."""
    simulate_devices: int | None = None
    """Simulate this many devices on the CPU, per process."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = NO_PROCESSES
    planning: Annotated[PlanOptions, tyro.conf.arg(name="")] = NO_PLAN
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""
    overwrite: bool = False
    """Replace the run in --out."""

    def train_config(self, num_examples: int) -> TrainConfig:
        """The train config for data of `num_examples` sequences per epoch."""
        steps_per_epoch = num_examples / self.train.batch_size
        steps, warmup_steps = self.train.steps, self.train.warmup_steps
        if self.epochs is not None:
            steps = max(round(self.epochs * steps_per_epoch), 1)
        if self.warmup_epochs is not None:
            warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        return dataclasses.replace(self.train, steps=steps, warmup_steps=warmup_steps)

    def check(self) -> None:
        """Raises UserError on options that are out of range or exclude each other."""
        values = {**vars(self), **vars(self.yaml), **vars(self.train), **vars(self.run)}
        counts = "steps batch_size grad_accum_steps save_every log_every simulate_devices keep_last eval_every workers"
        for name in (*counts.split(), "lora_rank"):
            if values[name] is not None and values[name] < 1:
                raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {values[name]}")
        for name in ("epochs", "lr", "clip_norm", "save_minutes", "lora_alpha"):
            if values[name] is not None and not values[name] > 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, got {values[name]}")
        names = ("seed", "keep_best", "min_lr", "warmup_steps", "warmup_epochs", "weight_decay", "aux_loss_weight")
        for name in names:
            if values[name] is not None and not values[name] >= 0:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {values[name]}")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"--max-skipped must be a fraction from 0 to 1, got {self.max_skipped:g}")
        for name in ("lora_rank", "lora_alpha", "lora_target_modules", "quantize"):
            if values[name] is not None and self.train.stage != "lora":
                raise UserError(f"--{name.replace('_', '-')} belongs to --stage lora; add it")
            if values[name] is not None and name.startswith("lora") and self.adapters:
                raise UserError(f"--{name.replace('_', '-')} is that of --adapters; leave it out")
        if self.adapters and self.init is None:
            raise UserError("--adapters adapt a checkpoint: give it with --init")
        if self.train.stage == "lora" and self.init is None and not self.planning.plan:
            raise UserError("--stage lora adapts a checkpoint: give it with --init")
        if self.epochs is not None and self.train.steps != TrainConfig.steps:
            raise UserError("--steps and --epochs exclude each other; give one of them")
        if self.warmup_epochs is not None and self.train.warmup_steps != TrainConfig.warmup_steps:
            raise UserError("--warmup-steps and --warmup-epochs exclude each other; give one of them")
        parse_steps(self.run.profile)
        self.planning.check()
        self.processes.check()
