"""Train SPHINX-MoE on any mesh. With no arguments: the nano preset, from scratch, on easy-vqa."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

import sharding
from sharding import is_primary_process
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import CheckpointSource, Loaded
from sphinx_jax.checkpoints.quantized_base import load_quantized
from sphinx_jax.cli import common
from sphinx_jax.cli.plan import plan_training
from sphinx_jax.cli.starting_adapters import with_adapters
from sphinx_jax.cli.startup import keep_freed_memory
from sphinx_jax.cli.train_options import Options
from sphinx_jax.cli.train_recipe import print_settings, with_recipe
from sphinx_jax.config import SphinxConfig, preset
from sphinx_jax.data.easy_vqa import IMAGE_SIZE
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tasks import EasyVqa, Task, YamlData
from sphinx_jax.data.tokenizer_files import without_chat_template
from sphinx_jax.errors import UserError
from sphinx_jax.memory_plan.fit import check_fits, device_capacity
from sphinx_jax.memory_plan.training import BatchShapes, shapes_of, training_batch
from sphinx_jax.sphinx import check_tokenizer
from sphinx_jax.training import run_directory
from sphinx_jax.training.auxiliary_probe import auxiliary_probe
from sphinx_jax.training.program import train_program
from sphinx_jax.training.step import AuxiliaryLoss
from sphinx_jax.training.train_config import TrainConfig
from sphinx_jax.training.trainer import train

EXAMPLES = """examples:
  python train.py
      train the nano preset on easy-vqa and print its held-out accuracy: about ten minutes on two CPU cores
  python train.py --simulate-devices 8 --mesh.tensor 2 --mesh.expert 2 --mesh.fsdp 2 --steps 20
      the same program on eight simulated devices
  python train.py --out runs/mine --steps 5000 --seed 1
  python train.py --out runs/mine --resume
      resume an interrupted run
  python train.py --init SPHINX-MoE --data data.yaml --out runs/mine
      fine-tune the published model as the original does: prints its settings, and whether they fit
  python train.py --init SPHINX-MoE --data data.yaml --out runs/mine --stage lora --quantize int4
      train adapters on a quantized base, for one GPU
  python train.py --plan --gpu a100-80gb --num-gpus 32 --preset sphinx-moe
      check whether this fits; needs no GPU and no data
"""


def main(argv: Sequence[str]) -> int:
    """Parse and run, or plan; returns the exit code."""
    options = common.parse(Options, argv, "train.py", f"{__doc__}\n\n{EXAMPLES}")
    options.check()
    if options.planning.plan:
        return plan(options, argv)
    run(options, argv)
    return 0


def run(options: Options, argv: Sequence[str] = ()) -> None:
    """Check the options and the data, then train and report the result. `argv` says which options were given."""
    if sharding.start_processes(options.processes) > 1:
        common.divert_native_stdout()
    if options.simulate_devices:
        sharding.simulate_devices(options.simulate_devices)
    source = checkpoints.open(options.init) if options.init else None
    config = source.config if source else preset(options.preset)
    options, recipe = with_recipe(options, argv, config, jax.device_count)
    options, source, adapters = with_adapters(options, source)
    out = run_directory.choose(options.out, options.preset)
    run_directory.check(out, options.resume, options.overwrite)
    if options.resume:
        run_directory.check_resume(out, options.preset, options.train, options.init)
    common.enable_compilation_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(options.mesh))
    sharding.check_processes(mesh)

    if recipe and is_primary_process():
        print_settings(options, argv, Console())
    if recipe and mesh.devices.flat[0].platform == "gpu":
        batch_shapes = training_batch(config, options.train, options.yaml.max_length)
        check_fits(config, options.train, mesh, batch_shapes, device_capacity(mesh))
    tokenizer_files = starting_tokenizer(source) if source else run_directory.tokenizer_files(out, options.resume)
    checkpoint = load_initial(source, mesh, options.train) if source else None
    skipped = SkippedRecords(options.max_skipped)
    task = make_task(options, config, tokenizer_files, skipped)
    train_config = options.train_config(task.examples)
    program = train_program(config, train_config, mesh, make_auxiliary_loss(options, config))
    task.batches(train_config.batch_size, train_config.seed)  # raises UserError if the data cannot fill a batch
    if options.resume:
        run_directory.check_data(out, task.fingerprint)
    described = dataclasses.asdict(options) | {"data_fingerprint": task.fingerprint}
    run_directory.prepare(out, described, options.overwrite)
    if is_primary_process():
        skipped.log_to(out / "skipped.jsonl")
        if train_config.lora and source:
            checkpoints.lora.write_adapter_info(out, source, train_config.lora, train_config.quantize)
    initial_model = checkpoint.params if checkpoint else None
    keep_freed_memory()
    summary = train(
        program,
        task,
        out,
        run_config=options.run,
        resume=options.resume,
        initial_model=initial_model,
        initial_adapters=adapters,
    )
    if not is_primary_process():
        return
    if summary is None:
        print(f"stopped by SIGTERM, the state is saved; to continue: the same command with --out {out} --resume")
    else:
        report(summary, out)
    if skipped:
        print(f"{len(skipped)} of {skipped.total} records were skipped: {out / 'skipped.jsonl'} names them")


def plan(options: Options, argv: Sequence[str]) -> int:
    """Print whether a step fits on --num-gpus GPUs of the kind --gpu; the exit code: 0 if it fits, else 1."""
    config = checkpoints.open(options.init).config if options.init else preset(options.preset)
    options, recipe = with_recipe(options, argv, config, lambda: options.planning.num_gpus or 1)
    if recipe:
        print_settings(options, argv, Console(stderr=True))
    if options.init and options.adapters:
        options = with_adapters(options, checkpoints.open(options.init))[0]
    name, task, auxiliary_loss = str(options.init or options.preset), None, None
    if options.data == "easy-vqa" and config.image_size == IMAGE_SIZE:
        task = make_task(options, config, None, SkippedRecords(options.max_skipped))
        auxiliary_loss = make_auxiliary_loss(options, config)

    def batch(train_config: TrainConfig) -> BatchShapes:
        if task is None:
            return training_batch(config, train_config, options.yaml.max_length)
        return shapes_of(next(task.batches(train_config.batch_size, train_config.seed)))

    return plan_training(options.planning, name, config, options.mesh, options.train, batch, auxiliary_loss)


def load_initial(source: CheckpointSource, mesh: Mesh, train_config: TrainConfig) -> Loaded:
    """The checkpoint to start from: trainable parameters in float32, a frozen base in the compute dtype, or quantized
    as it is read.
    """
    if train_config.quantize:
        return load_quantized(source, mesh, train_config.dtype, train_config.quantize)
    dtype = train_config.dtype if train_config.stage == "lora" else "float32"
    return checkpoints.load(source, mesh, dtype, unstacked=False)


def starting_tokenizer(source: CheckpointSource) -> dict[str, bytes]:
    """The tokenizer's files of the checkpoint to start from. Raises UserError if it has none of its own."""
    check_tokenizer(source)
    return without_chat_template(source.assets)


def make_task(
    options: Options, config: SphinxConfig, tokenizer_files: Mapping[str, bytes] | None, skipped: SkippedRecords
) -> Task:
    if options.data == "easy-vqa":
        return EasyVqa(config, tokenizer_files, validation_split=options.validation_split)
    if Path(options.data).suffix in (".yaml", ".yml"):
        return YamlData(Path(options.data), config, tokenizer_files, skipped, options.yaml)
    raise UserError(f"--data {options.data}: unknown; give easy-vqa or a .yaml file")


def make_auxiliary_loss(options: Options, config: SphinxConfig) -> AuxiliaryLoss | None:
    """The probe of easy-vqa. None with other data, and with LoRA, which freezes the encoders."""
    if options.data != "easy-vqa" or options.train.lora or not options.aux_loss_weight:
        return None
    return auxiliary_probe(config.language.dim, options.aux_loss_weight)


def report(summary: dict, out: Path) -> None:
    """Print the results of a run."""
    print(f"{summary['steps']} steps in {summary['seconds']:.0f} s. Held-out accuracy, and that of a blind baseline:")
    for kind, accuracy in summary["held_out"].items():
        blind = summary.get("blind", {}).get(kind)
        value = "unknown: none held out could be used" if accuracy is None else f"{accuracy:6.1%}"
        print(f"  {kind:8} {value}" + ("" if blind is None else f"   blind {blind:6.1%}"))
    if summary["expert_share"] is not None:
        expert_load = ", ".join(f"{fraction:.1%}" for fraction in summary["expert_share"])
        print(f"expert load, the fraction of tokens routed to each expert: {expert_load}")
    print(f"try it: python infer.py --checkpoint {out}")
