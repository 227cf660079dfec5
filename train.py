"""Train SPHINX-MoE on any mesh. With no arguments: the nano preset, from scratch, on easy-vqa."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

import sharding
from sharding import MeshShape
from sphinx_jax import checkpoints, commandline, planning
from sphinx_jax.config import SphinxConfig, preset
from sphinx_jax.data.easy_vqa import IMAGE_SIZE
from sphinx_jax.data.task import EasyVqa, Task, YamlData
from sphinx_jax.errors import UserError
from sphinx_jax.model import SphinxMoE
from sphinx_jax.planning import NO_PLAN, PlanOptions
from sphinx_jax.training.loop import train
from sphinx_jax.training.optimizer import MomentDtype, Stage
from sphinx_jax.training.recipe import ComputeDtype, Recipe, Remat, check_batch
from sphinx_jax.training.run_directory import check_run_directory, prepare_run_directory

EXAMPLES = """examples:
  python train.py
      train the nano preset on easy-vqa and print its held-out accuracy, about ten minutes on two CPU cores
  python train.py --simulate-devices 8 --mesh.tensor 2 --mesh.expert 2 --mesh.fsdp 2 --steps 20
      the same program over eight simulated devices
  python train.py --out runs/mine --steps 5000 --seed 1
  python train.py --out runs/mine --resume
      go on where a run was interrupted
  python train.py --plan --gpu a100-80gb --num-gpus 32 --preset sphinx-moe --stage mm_stage2 --max-length 2048
                  --batch-size 32 --dtype bfloat16 --remat block
      would this fit? needs no GPU and no data
"""


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
    out: Path | None = None
    """Run directory to write; runs/PRESET-DATE by default."""
    steps: int | None = None
    """Optimizer steps; 900 unless --epochs is given."""
    epochs: float | None = None
    """Length in passes over the data, instead of --steps."""
    batch_size: int = 64
    """Pictures (conversations) in one optimizer step, over all devices."""
    accumulate: int = 1
    """Work through each batch in this many parts, to save memory."""
    lr: float = 3e-3
    """Peak learning rate."""
    seed: int = 0
    """Of weights, order and augmentation."""
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    """Devices along each axis; one device by default."""
    simulate_devices: int | None = None
    """Pretend that this CPU is so many devices."""
    attribute_weight: float = 1.0
    """Weight of the auxiliary loss on shape and colour of easy-vqa pictures; 0 trains on the answers alone."""
    stage: Stage = "everything"
    """What learns: everything; mm_stage2, all but the encoders; mm_stage1, the projection of the encoders' words and
    the image markers; language, the decoder."""
    dtype: ComputeDtype = "float32"
    """What the model computes in. Master weights are float32 either way."""
    remat: Remat = "none"
    """What is computed a second time for the gradient, to save memory: nothing; each layer (block); each layer but
    its matrix products (dots)."""
    moments: MomentDtype = "float32"
    """What AdamW's two moments are kept in; bfloat16 takes half the memory and rounds them to 8 bits every step."""
    tuning: bool = False
    """Hold out a tenth of the training pictures and judge by them; the test set is left alone."""
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    planning: Annotated[PlanOptions, tyro.conf.arg(name="")] = NO_PLAN
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""
    overwrite: bool = False
    """Replace the run in --out."""


def main(argv: Sequence[str]) -> int:
    """Parse and run, or plan; returns the exit code."""
    options = commandline.parse(Options, argv, "train.py", f"{__doc__}\n\n{EXAMPLES}")
    check_options(options)
    if options.planning.plan:
        return plan(options)
    run(options)
    return 0


def run(options: Options) -> None:
    """Check everything that can be checked, then train and say how it went."""
    out = options.out or Path("runs") / f"{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_run_directory(out, options.resume, options.overwrite)
    if options.simulate_devices:
        sharding.simulate_devices(options.simulate_devices)
    mesh = sharding.make_mesh(**dataclasses.asdict(options.mesh))

    start = checkpoints.load(options.init, mesh, "float32", apart=False) if options.init else None
    config = start.config if start else preset(options.preset)
    task = make_task(options, config, start.tokenizer_bytes if start else None)
    recipe = make_recipe(options, make_steps(options, task.examples))
    check_batch(recipe, mesh)
    sharding.abstract_params(lambda rngs: SphinxMoE(config, rngs=rngs), mesh)
    prepare_run_directory(out, dataclasses.asdict(options), options.overwrite)
    summary = train(
        config,
        task,
        recipe,
        mesh,
        out,
        initial=start.params if start else None,
        resume=options.resume,
        save_every=options.save_every,
        log_every=options.log_every,
    )
    report(summary, out)


def plan(options: Options) -> int:
    """Say whether a step would fit on the cards that --gpu and --num-gpus name; 0 if it does, 1 if not."""
    config = checkpoints.open(options.init).config if options.init else preset(options.preset)
    recipe = make_recipe(options, options.steps or 900)
    if options.data == "easy-vqa" and config.image_size == IMAGE_SIZE:
        task = make_task(options, config, None)
        batch = lambda recipe: planning.shapes_of(next(task.batches(recipe.batch_size, recipe.seed)))
    else:
        recipe = dataclasses.replace(recipe, attribute_weight=0.0)
        batch = lambda recipe: planning.training_batch(config, recipe, options.max_length)
    name = str(options.init or options.preset)
    return planning.plan_training(options.planning, name, config, options.mesh, recipe, batch)


def make_recipe(options: Options, steps: int) -> Recipe:
    return Recipe(
        steps=steps,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        lr=options.lr,
        attribute_weight=options.attribute_weight if options.data == "easy-vqa" else 0.0,
        stage=options.stage,
        remat=options.remat,
        dtype=options.dtype,
        moments=options.moments,
        seed=options.seed,
    )


def check_options(options: Options) -> None:
    """Raises UserError on values that no run can have."""
    for name in ("steps", "batch_size", "accumulate", "save_every", "log_every", "simulate_devices"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("epochs", "lr"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, got {value}")
    options.planning.check()
    if options.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {options.seed}")
    if options.steps is not None and options.epochs is not None:
        raise UserError("--steps and --epochs exclude each other; give one of them")


def make_task(options: Options, config: SphinxConfig, tokenizer_bytes: bytes | None) -> Task:
    if options.data == "easy-vqa":
        return EasyVqa(config, tokenizer_bytes, tuning=options.tuning)
    if Path(options.data).suffix in (".yaml", ".yml"):
        return YamlData(Path(options.data), config, tokenizer_bytes, options.max_length)
    raise UserError(f"--data {options.data}: unknown; give easy-vqa or a .yaml file")


def make_steps(options: Options, examples: int) -> int:
    if options.epochs is not None:
        return max(round(options.epochs * examples / options.batch_size), 1)
    return 900 if options.steps is None else options.steps


def report(summary: dict, out: Path) -> None:
    """The end of a run, for a person."""
    print(f"{summary['steps']} steps in {summary['seconds']:.0f} s. Held-out accuracy, and that of answering blind:")
    for kind, share in summary["held_out"].items():
        blind = summary.get("blind", {}).get(kind)
        print(f"  {kind:8} {share:6.1%}" + ("" if blind is None else f"   blind {blind:6.1%}"))
    shares = ", ".join(f"{share:.1%}" for share in summary["expert_share"])
    print(f"share of the words that each expert received: {shares}")
    print(f"try it: python infer.py --checkpoint {out}")


if __name__ == "__main__":
    sys.exit(commandline.run(main, sys.argv[1:]))
