"""Train SPHINX-MoE on any mesh. With no arguments: the nano preset, from scratch, on easy-vqa."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import sharding
from sharding import MeshShape
from sphinx_jax import checkpoints, commandline
from sphinx_jax.checkpoints.writing import is_lead
from sphinx_jax.config import SphinxConfig, preset
from sphinx_jax.data.images import ImageTransform
from sphinx_jax.data.skipped import SkipLog
from sphinx_jax.data.task import EasyVqa, Task, YamlData, YamlOptions
from sphinx_jax.errors import UserError
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training import run_directory
from sphinx_jax.training.loop import Recipe, Upkeep, check_batch, train
from sphinx_jax.training.optimizer import Stage

EXAMPLES = """examples:
  python train.py
      train the nano preset on easy-vqa and print its held-out accuracy, about ten minutes on two CPU cores
  python train.py --simulate-devices 8 --mesh.tensor 2 --mesh.expert 2 --mesh.fsdp 2 --steps 20
      the same program over eight simulated devices
  python train.py --out runs/mine --steps 5000 --seed 1
  python train.py --out runs/mine --resume
      go on where a run was interrupted
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a model and write a run directory that `infer.py --checkpoint` takes."""

    preset: str = "nano"
    """Which model: nano, mixtral-140m, mixtral-8x7b, sphinx-moe or sphinx-moe-1k."""
    init: Path | None = None
    """Start from the weights of this checkpoint, instead of from random ones."""
    data: str = "easy-vqa"
    """What to train on: easy-vqa, or a data.yaml that names files of conversations (docs/data.md)."""
    max_length: int = 256
    """Longest sequence of one conversation, image words included; for a data.yaml."""
    image_transform: ImageTransform = "pad"
    """How its training pictures become squares: padded, or cropped at random."""
    mix_lengths: bool = False
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
    tuning: bool = False
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
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""
    overwrite: bool = False
    """Replace the run in --out."""


def main(argv: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    run(commandline.parse(Options, argv, "train.py", f"{__doc__}\n\n{EXAMPLES}"))
    return 0


def run(options: Options) -> None:
    """Check everything that can be checked, then train and say how it went."""
    check_options(options)
    out = options.out or Path("runs") / f"{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_directory.check(out, options.resume, options.overwrite)
    if options.simulate_devices:
        sharding.simulate_devices(options.simulate_devices)
    mesh = sharding.make_mesh(**dataclasses.asdict(options.mesh))

    start = checkpoints.load(options.init, mesh, "float32", apart=False) if options.init else None
    config = start.config if start else preset(options.preset)
    skipped = SkipLog(options.max_skipped)
    task = make_task(
        options, config, start.tokenizer_bytes if start else run_directory.tokenizer_bytes(out, options.resume), skipped
    )
    recipe = Recipe(
        steps=make_steps(options, task.examples),
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        lr=options.lr,
        attribute_weight=options.attribute_weight if options.data == "easy-vqa" else 0.0,
        stage=options.stage,
        seed=options.seed,
    )
    check_batch(recipe, mesh)
    task.batches(recipe.batch_size, recipe.seed)  # raises where the data cannot fill a batch
    sharding.abstract_params(lambda rngs: SphinxMoE(config, rngs=rngs), mesh)
    run_directory.prepare(out, dataclasses.asdict(options), options.overwrite)
    if is_lead():
        skipped.keep_in(out / "skipped.jsonl")
    summary = train(
        config,
        task,
        recipe,
        mesh,
        out,
        initial=start.params if start else None,
        upkeep=make_upkeep(options),
        resume=options.resume,
    )
    if not is_lead():
        return
    if summary is None:
        print(f"stopped by SIGTERM, everything is saved; to go on: the same command with --out {out} --resume")
    else:
        report(summary, out)
    if skipped:
        print(f"{len(skipped)} of {skipped.total} records were skipped: {out / 'skipped.jsonl'} names them")


def check_options(options: Options) -> None:
    """Raises UserError on values that no run can have."""
    counts = (
        "steps",
        "batch_size",
        "accumulate",
        "save_every",
        "log_every",
        "simulate_devices",
        "keep_last",
        "eval_every",
        "workers",
    )
    for name in counts:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("epochs", "lr", "save_minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    profiled_steps(options.profile)
    if not 0 <= options.max_skipped <= 1:
        raise UserError(f"--max-skipped must be a share from 0 to 1, got {options.max_skipped:g}")
    for name in ("seed", "keep_best"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(options, name)}")
    if options.steps is not None and options.epochs is not None:
        raise UserError("--steps and --epochs exclude each other; give one of them")


def make_task(options: Options, config: SphinxConfig, tokenizer_bytes: bytes | None, skipped: SkipLog) -> Task:
    if options.data == "easy-vqa":
        return EasyVqa(config, tokenizer_bytes, tuning=options.tuning)
    if Path(options.data).suffix in (".yaml", ".yml"):
        said = {field.name: getattr(options, field.name) for field in dataclasses.fields(YamlOptions)}
        return YamlData(Path(options.data), config, tokenizer_bytes, skipped, YamlOptions(**said))
    raise UserError(f"--data {options.data}: unknown; give easy-vqa or a .yaml file")


def make_upkeep(options: Options) -> Upkeep:
    said = {field.name: getattr(options, field.name) for field in dataclasses.fields(Upkeep)}
    return Upkeep(**said | {"profile": profiled_steps(options.profile)})


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
