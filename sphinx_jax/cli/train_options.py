"""The options of `train.py`, and what is made of them."""

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
    """Which model: nano, mixtral-140m, sphinx-tiny, sphinx-mini, mixtral-8x7b, sphinx-moe or sphinx-moe-1k."""
    init: Path | None = None
    """Start from the weights of this checkpoint, instead of from random ones."""
    data: str = "easy-vqa"
    """What to train on: easy-vqa, or a data.yaml that names files of conversations (docs/data.md)."""
    max_length: int = 256
    """Longest sequence of one conversation, image words included; for a data.yaml."""
    image_transform: ImageTransform = "pad"
    """How its training pictures become squares: padded, or cropped at random."""
    no_group_by_length: bool = False
    """Mix conversations of all lengths in a batch, instead of neighbours in length: right where the answer's length
    tells the answer, as with labels."""
    pack: bool = False
    """Put several of its conversations without pictures into one sequence, where each sees itself only."""
    max_skipped: float = 0.01
    """Share of its records, malformed or with pictures that do not open, that may be passed over."""
    workers: int = 2
    """Threads that read its pictures and make batches."""
    out: Path | None = None
    """Run directory to write; runs/PRESET-DATE by default."""
    steps: int | None = None
    """Optimizer steps; 900 unless --epochs is given."""
    epochs: float | None = None
    """Length in passes over the data, instead of --steps."""
    batch_size: int = 64
    """Pictures (conversations) in one optimizer step, over all devices."""
    grad_accum_steps: int = 1
    """Work through each batch in this many parts, to save memory."""
    lr: float = 3e-3
    """Peak learning rate."""
    seed: int = 0
    """Of weights, order and augmentation."""
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    """Devices along each axis; one device by default."""
    simulate_devices: int | None = None
    """Pretend that this CPU is so many devices; with several processes, for each of them."""
    processes: Annotated[Processes, tyro.conf.arg(name="")] = NO_PROCESSES
    aux_loss_weight: float = 1.0
    """Weight of the auxiliary loss on shape and colour of easy-vqa pictures; 0 trains on the answers alone."""
    stage: Stage = "all"
    """What learns: everything; mm_stage2, all but the encoders; mm_stage1, the projection of the encoders' words and
    the image markers; language, the decoder; lora, adapters beside --init, which stays as it is
    (docs/fine-tuning.md)."""
    lora_rank: int | None = None
    """Rank of the adapters, 8 by default."""
    lora_alpha: float | None = None
    """Their product is scaled by alpha / rank; twice the rank by default."""
    lora_target_modules: LoraTargets | None = None
    """Which matrices get one: those of attention alone, or all, the experts' too, which is the default."""
    dtype: ComputeDtype = "float32"
    """What the model computes in. Master weights are float32 either way."""
    remat: Remat = "none"
    """What is computed a second time for the gradient, to save memory: nothing; each layer (block); each layer but
    its matrix products (dots)."""
    sequence_parallel: bool = False
    """Split the residual stream along the sequence between blocks, over the devices of tensor and expert: saves memory
    for the same exchanges. The length of the sequences should be a multiple of their number."""
    moments: Moments = "float32"
    """What AdamW keeps of its two moments: float32, 8 bytes a parameter; bfloat16, 4; factored, Adafactor's second
    moment beside a first in bfloat16, 2; int8, both in blocks of 8 bits, 2.1 (docs/training-runs.md)."""
    validation_split: bool = False
    """Hold out a tenth of the training pictures and judge by them; the test set is left alone."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_minutes: float = 15.0
    """Minutes after which one is saved in any case."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: int = 1
    """How many of those with the best held-out accuracy stay besides; see --eval-every."""
    profile: str | None = None
    """Steps FIRST:LAST to record in OUT/profile, for TensorBoard or Perfetto."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out examples, each followed by a checkpoint; only at the end by default."""
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
        # Adapters do not reach the encoders.
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
    """Raises UserError on values that no run can have."""
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
        raise UserError(f"--max-skipped must be a share from 0 to 1, got {options.max_skipped:g}")
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
    said = {field.name: getattr(options, field.name) for field in dataclasses.fields(RunConfig)}
    return RunConfig(**said | {"profile": profiled_steps(options.profile)})


def profiled_steps(said: str | None) -> range:
    """Raises UserError on what is not FIRST:LAST."""
    first, _, last = (said or "1:0").partition(":")
    if not (first.isdecimal() and last.isdecimal()) or (said and not 1 <= int(first) <= int(last)):
        raise UserError(f"--profile {said}: must be FIRST:LAST, two steps, such as 20:22")
    return range(int(first), int(last) + 1)


def make_steps(options: Options, examples: int) -> int:
    if options.epochs is not None:
        return max(round(options.epochs * examples / options.batch_size), 1)
    return 900 if options.steps is None else options.steps
