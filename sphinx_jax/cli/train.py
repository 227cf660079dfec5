"""Train SPHINX-MoE on any mesh. With no arguments: the nano preset, from scratch, on easy-vqa."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import sharding
from sharding import is_primary_process
from sphinx_jax import checkpoints
from sphinx_jax.cli import common
from sphinx_jax.cli.plan import plan_training
from sphinx_jax.cli.train_options import (
    Options,
    check_options,
    make_lora,
    make_run_config,
    make_steps,
    make_train_config,
)
from sphinx_jax.config import SphinxConfig, preset
from sphinx_jax.data.easy_vqa import IMAGE_SIZE
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tasks import EasyVqa, Task, YamlData, YamlOptions
from sphinx_jax.errors import UserError
from sphinx_jax.memory_plan.training import shapes_of, training_batch
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training import run_directory
from sphinx_jax.training.train_config import check_batch
from sphinx_jax.training.trainer import train

EXAMPLES = """examples:
  python train.py
      train the nano preset on easy-vqa and print its held-out accuracy: about ten minutes on two CPU cores
  python train.py --simulate-devices 8 --mesh.tensor 2 --mesh.expert 2 --mesh.fsdp 2 --steps 20
      the same program on eight simulated devices
  python train.py --out runs/mine --steps 5000 --seed 1
  python train.py --out runs/mine --resume
      resume an interrupted run
  python train.py --plan --gpu a100-80gb --num-gpus 32 --preset sphinx-moe --stage mm_stage2 --max-length 2048
                  --batch-size 32 --dtype bfloat16 --remat block
      check whether this fits; needs no GPU and no data
"""


def main(argv: Sequence[str]) -> int:
    """Parse and run, or plan; returns the exit code."""
    options = common.parse(Options, argv, "train.py", f"{__doc__}\n\n{EXAMPLES}")
    check_options(options)
    if options.planning.plan:
        return plan(options)
    run(options)
    return 0


def run(options: Options) -> None:
    """Check the options and the data, then train and report the result."""
    if sharding.start_processes(options.processes) > 1:
        common.divert_native_stdout()
    if options.simulate_devices:
        sharding.simulate_devices(options.simulate_devices)
    out = run_directory.choose(options.out, options.preset)
    run_directory.check(out, options.resume, options.overwrite)
    if options.resume:
        run_directory.check_adapters(out, make_lora(options), options.init)
        run_directory.check_same(out, dataclasses.asdict(options))
    common.enable_compilation_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(options.mesh))
    sharding.check_processes(mesh)

    # A frozen LoRA base is stored in the compute dtype; trainable parameters are float32.
    dtype = options.dtype if options.stage == "lora" else "float32"
    checkpoint = checkpoints.load(options.init, mesh, dtype, unstacked=False) if options.init else None
    config = checkpoint.config if checkpoint else preset(options.preset)
    skipped = SkippedRecords(options.max_skipped)
    tokenizer_bytes = checkpoint.tokenizer_bytes if checkpoint else run_directory.tokenizer_bytes(out, options.resume)
    task = make_task(options, config, tokenizer_bytes, skipped)
    train_config = make_train_config(options, make_steps(options, task.examples))
    check_batch(train_config, mesh)
    task.batches(train_config.batch_size, train_config.seed)  # raises UserError if the data cannot fill a batch
    sharding.abstract_params(lambda rngs: SphinxMoE(config, rngs=rngs), mesh)
    run_directory.prepare(out, dataclasses.asdict(options), options.overwrite)
    if is_primary_process():
        skipped.log_to(out / "skipped.jsonl")
        if train_config.lora:
            checkpoints.lora.write_adapter_info(out, checkpoints.open(options.init), train_config.lora)
    summary = train(
        config,
        task,
        train_config,
        mesh,
        out,
        initial=checkpoint.params if checkpoint else None,
        run_config=make_run_config(options),
        resume=options.resume,
    )
    if not is_primary_process():
        return
    if summary is None:
        print(f"stopped by SIGTERM, the state is saved; to continue: the same command with --out {out} --resume")
    else:
        report(summary, out)
    if skipped:
        print(f"{len(skipped)} of {skipped.total} records were skipped: {out / 'skipped.jsonl'} names them")


def plan(options: Options) -> int:
    """Print whether a step fits on --num-gpus GPUs of the kind --gpu; the exit code: 0 if it fits, else 1."""
    config = checkpoints.open(options.init).config if options.init else preset(options.preset)
    train_config = make_train_config(options, options.steps or 900)
    if options.data == "easy-vqa" and config.image_size == IMAGE_SIZE:
        task = make_task(options, config, None, SkippedRecords(options.max_skipped))
        batch = lambda train_config: shapes_of(next(task.batches(train_config.batch_size, train_config.seed)))
    else:
        train_config = dataclasses.replace(train_config, aux_loss_weight=0.0)
        batch = lambda train_config: training_batch(config, train_config, options.max_length)
    name = str(options.init or options.preset)
    return plan_training(options.planning, name, config, options.mesh, train_config, batch)


def make_task(options: Options, config: SphinxConfig, tokenizer_bytes: bytes | None, skipped: SkippedRecords) -> Task:
    if options.data == "easy-vqa":
        return EasyVqa(config, tokenizer_bytes, validation_split=options.validation_split)
    if Path(options.data).suffix in (".yaml", ".yml"):
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(YamlOptions)}
        return YamlData(Path(options.data), config, tokenizer_bytes, skipped, YamlOptions(**values))
    raise UserError(f"--data {options.data}: unknown; give easy-vqa or a .yaml file")


def report(summary: dict, out: Path) -> None:
    """Print the results of a run."""
    print(f"{summary['steps']} steps in {summary['seconds']:.0f} s. Held-out accuracy, and that of a blind baseline:")
    for kind, accuracy in summary["held_out"].items():
        blind = summary.get("blind", {}).get(kind)
        print(f"  {kind:8} {accuracy:6.1%}" + ("" if blind is None else f"   blind {blind:6.1%}"))
    expert_load = ", ".join(f"{fraction:.1%}" for fraction in summary["expert_share"])
    print(f"expert load, the fraction of tokens routed to each expert: {expert_load}")
    print(f"try it: python infer.py --checkpoint {out}")
