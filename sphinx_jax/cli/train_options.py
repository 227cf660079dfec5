"""The options of `train.py`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sharding import NO_PROCESSES, MeshShape, Processes
from sphinx_jax.cli.common import NO_PLAN, PlanOptions
from sphinx_jax.config import LoraConfig, LoraTargets
from sphinx_jax.data.images import ImageTransform
from sphinx_jax.errors import UserError
from sphinx_jax.training.moments import Moments
from sphinx_jax.training.optimizer import Stage
from sphinx_jax.training.train_config import ComputeDtype, Remat, TrainConfig
from sphinx_jax.training.trainer import RunConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a model and write a run directory that `infer.py --checkpoint` takes."""

    preset: str = "nano"
    """Model preset: nano, mixtral-140m, sphinx-tiny, sphinx-mini, mixtral-8x7b, sphinx-moe or sphinx-moe-1k."""
    init: Path | None = None
    """Checkpoint to start from, in any format; random initialisation by default."""
    data: str = "easy-vqa"
    """Training data: easy-vqa, or a data.yaml that lists files of conversations (docs/data.md)."""
    max_length: int = 256
    """data.yaml: longest sequence of one conversation, in tokens, image tokens included."""
    image_transform: ImageTransform = "pad"
    """data.yaml: how training images become square: pad, or random crop."""
    no_group_by_length: bool = False
    """data.yaml: mix lengths within a batch instead of grouping conversations by length. Needed where the length
    reveals the answer, as with class labels."""
    pack: bool = False
    """data.yaml: pack several conversations without images into one sequence; attention stays within each of them."""
    max_skipped: float = 0.01
    """data.yaml: largest fraction of records to skip, malformed or with unreadable images, before the run stops."""
    workers: int = 2
    """data.yaml: threads that load images and build batches."""
    out: Path | None = None
    """Run directory to write; runs/PRESET-DATE by default."""
    steps: int | None = None
    """Optimizer steps; 900 unless --epochs is given."""
    epochs: float | None = None
    """Epochs over the training data, instead of --steps."""
    batch_size: int = 64
    """Global batch size: sequences per optimizer step, over all devices."""
    grad_accum_steps: int = 1
    """Gradient accumulation: microbatches per optimizer step."""
    lr: float = 3e-3
    """Peak learning rate."""
    seed: int = 0
    """Random seed of initialisation, data order and augmentation."""
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    """Devices along each mesh axis; one device by default."""
    simulate_devices: int | None = None
    """Simulate this many devices on the CPU, per process."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = NO_PROCESSES
    aux_loss_weight: float = 1.0
    """easy-vqa: weight of the auxiliary probe loss on the shape and colour in each image; 0 disables it."""
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
    validation_split: bool = False
    """easy-vqa: evaluate on a tenth of the training images, held out, instead of on the test set."""
    log_every: int = 20
    """Steps between log lines in metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_minutes: float = 15.0
    """Longest time between checkpoints, in minutes."""
    keep_last: int = 2
    """Newest checkpoints to preserve."""
    keep_best: int = 1
    """Checkpoints with the best held-out accuracy to preserve as well; see --eval-every."""
    profile: str | None = None
    """Profile the steps FIRST:LAST into OUT/profile, for TensorBoard or Perfetto."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out examples, each followed by a checkpoint; by default only at the end."""
    planning: Annotated[PlanOptions, tyro.conf.arg(name="")] = NO_PLAN
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""
    overwrite: bool = False
    """Replace the run in --out."""


def make_train_config(options: Options, steps: int) -> TrainConfig:
    lora = make_lora(options)
    return TrainConfig(
        steps=steps,
        batch_size=options.batch_size,
        grad_accum_steps=options.grad_accum_steps,
        lr=options.lr,
        # LoRA freezes the encoders.
        aux_loss_weight=options.aux_loss_weight if options.data == "easy-vqa" and not lora else 0.0,
        stage=options.stage,
        lora=lora,
        remat=options.remat,
        sequence_parallel=options.sequence_parallel,
        dtype=options.dtype,
        moments=options.moments,
        seed=options.seed,
    )


def make_lora(options: Options) -> LoraConfig | None:
    rank = options.lora_rank or 8
    alpha, targets = options.lora_alpha or 2.0 * rank, options.lora_target_modules or "all"
    return LoraConfig(rank, alpha, targets) if options.stage == "lora" else None


def check_options(options: Options) -> None:
    """Raises UserError on options that are out of range or exclude each other."""
    counts = (
        "steps",
        "batch_size",
        "grad_accum_steps",
        "save_every",
        "log_every",
        "simulate_devices",
        "keep_last",
        "eval_every",
        "workers",
        "lora_rank",
    )
    for name in counts:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("epochs", "lr", "save_minutes", "lora_alpha"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    profiled_steps(options.profile)
    if not 0 <= options.max_skipped <= 1:
        raise UserError(f"--max-skipped must be a fraction from 0 to 1, got {options.max_skipped:g}")
    for name in ("seed", "keep_best"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(options, name)}")
    for name in ("lora_rank", "lora_alpha", "lora_target_modules"):
        if getattr(options, name) is not None and options.stage != "lora":
            raise UserError(f"--{name.replace('_', '-')} belongs to --stage lora; add it")
    if options.stage == "lora" and options.init is None and not options.planning.plan:
        raise UserError("--stage lora adapts a checkpoint: give it with --init")
    options.planning.check()
    options.processes.check()
    if options.steps is not None and options.epochs is not None:
        raise UserError("--steps and --epochs exclude each other; give one of them")


def make_run_config(options: Options) -> RunConfig:
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(RunConfig)}
    return RunConfig(**values | {"profile": profiled_steps(options.profile)})


def profiled_steps(text: str | None) -> range:
    """The steps of FIRST:LAST, none by default. Raises UserError on another form."""
    first, _, last = (text or "1:0").partition(":")
    if not (first.isdecimal() and last.isdecimal()) or (text and not 1 <= int(first) <= int(last)):
        raise UserError(f"--profile {text}: must be FIRST:LAST, two steps, such as 20:22")
    return range(int(first), int(last) + 1)


def make_steps(options: Options, examples: int) -> int:
    if options.epochs is not None:
        return max(round(options.epochs * examples / options.batch_size), 1)
    return 900 if options.steps is None else options.steps
