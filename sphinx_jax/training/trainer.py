"""The training loop: one function, from a train program and a task to a finished run directory."""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

import sharding
from sharding import Program, is_primary_process
from sphinx_jax.checkpoints import lora
from sphinx_jax.checkpoints.formats import native
from sphinx_jax.checkpoints.source import Adapters
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.tasks import Task, primary_accuracy
from sphinx_jax.errors import UserError
from sphinx_jax.lora_params import split, with_factors
from sphinx_jax.training.checkpoint_store import CheckpointStore
from sphinx_jax.training.export import write_description
from sphinx_jax.training.guards import DivergenceGuard
from sphinx_jax.training.metrics import RunLog
from sphinx_jax.training.moments import MOMENTS
from sphinx_jax.training.preemption import PreemptionGuard, any_process
from sphinx_jax.training.profile import StepProfile, parse_steps
from sphinx_jax.training.program import TrainProgram, make_model
from sphinx_jax.training.step import Batch, Params, TrainState
from sphinx_jax.training.train_config import schedule
from sphinx_jax.training.train_state import init_state
from sphinx_jax.training.utilisation import peak_flops, step_flops


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Checkpoints, logs, evaluation and profile of a run: nothing here changes its numbers."""

    log_every: int = 20
    """Steps between log lines in metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_minutes: float = 15.0
    """Longest time between checkpoints, in minutes; with several processes checked at every log line."""
    keep_last: int = 2
    """Newest checkpoints to preserve."""
    keep_best: int = 1
    """Checkpoints with the best held-out accuracy to preserve as well; see --eval-every."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out examples, each followed by a checkpoint; by default only at the end."""
    profile: str | None = None
    """Profile the steps FIRST:LAST into OUT/profile, for TensorBoard or Perfetto."""


class Evaluation(NamedTuple):
    """The task's results on the held-out examples, and the expert load."""

    results: dict[str, Any]
    expert_load: Float[np.ndarray, "layers experts"] | None


def train(
    program: TrainProgram,
    task: Task,
    out: Path,
    *,
    run_config: RunConfig = RunConfig(),
    resume: bool = False,
    initial_model: Params | None = None,
    initial_adapters: Adapters | None = None,
) -> dict[str, Any] | None:
    """Train, evaluate on the held-out examples, write `out`, and return the content of its `summary.json`.

    Returns None if SIGTERM ended the run early; the state is saved then. `initial_model` are the model parameters to
    start from, on the mesh; by default they are initialised from the seed. A LoRA run does not save them, and needs
    them again to resume. `initial_adapters` are adapters to train on, of the program's scale; their rank may be lower.
    `resume` continues from the newest checkpoint, if there is one yet. Raises UserError if a loss or gradient norm is
    not finite.
    """
    start_time = time.monotonic()
    train_config, mesh = program.train_config, program.mesh
    if is_primary_process():
        write_description(out, program.config, task.tokenizer_files)
    batches = task.batches(train_config.batch_size, train_config.seed)
    store = CheckpointStore(out / "checkpoints", run_config.keep_last, run_config.keep_best)
    restored = store.restore(program.state) if resume else None
    frozen_params = {name: initial_params(program, name, initial_model) for name in program.frozen_params}
    if restored:
        state, position = restored
        batches.set_state(position)
    else:
        params = {name: initial_params(program, name, initial_model) for name in program.state.params}
        if initial_adapters:
            params["adapters"] = with_factors(params["adapters"], initial_adapters.factors)
        state = init_state(params, program.optimizer, mesh)

    step_count = int(state.step)
    train_step, evaluate = compile_by_shape(program.step, mesh), make_evaluate(program, task)
    divergence_guard, preemption_guard = DivergenceGuard(out, store), PreemptionGuard()
    profile = StepProfile(out / "profile", parse_steps(run_config.profile))
    learning_rate = schedule(train_config)
    flops = functools.cache(lambda text_len, has_images: step_flops(program, text_len, has_images).total)
    peak = peak_flops(mesh.devices.flat[0].device_kind, mesh.size, train_config.dtype)
    run_log = RunLog(out, train_config.steps, first_step=step_count, peak_flops=peak)
    last_save, stop, evaluation = time.monotonic(), False, None

    def due(every: int | None) -> bool:
        return every is not None and (step_count % every == 0 or step_count == train_config.steps)

    with preemption_guard, run_log as log:
        logged = log.last
        opt_state_mib = sharding.bytes_per_device(program.state.opt_state) / 2**20
        moments = f"AdamW state: {MOMENTS[train_config.moments]}, {opt_state_mib:,.1f} MiB per device"
        log.console.print(moments, highlight=False, markup=False)
        while step_count < train_config.steps and not stop:
            try:
                batch = next(batches)
            except UserError:
                # A data error must not lose the steps before it.
                divergence_guard.check()
                store.save(state, batches.get_state())
                store.close()
                raise
            examples = [task.name(i) for i in batch.pop("examples").tolist()]
            with profile.before(step_count + 1):
                state, metrics = train_step(state, shard_batch(batch, mesh), frozen_params)
            step_count += 1
            profile.after(step_count, metrics)
            divergence_guard.record(step_count, metrics, examples)
            text_len, num_images = batch["tokens"].shape[1], len(batch.get("images", ()))
            num_tokens = len(batch["tokens"]) * text_len + program.config.num_image_tokens * num_images
            log.count(step_count, num_tokens, num_images, flops(text_len, num_images > 0))

            # Clocks differ between processes: they agree at the logged steps, which wait for the device anyway.
            save_due = (time.monotonic() - last_save) / 60 >= run_config.save_minutes
            save_due = (jax.process_count() == 1 or due(run_config.log_every)) and any_process(save_due)
            stop, evaluation = preemption_guard.should_stop(), None
            if due(run_config.eval_every) and not stop:
                divergence_guard.check()
                evaluation = evaluate(frozen_params | state.params, preemption_guard)
            if due(run_config.log_every) or evaluation:
                logged = {name: np.asarray(value).tolist() for name, value in metrics.items()}
                logged["lr"] = float(learning_rate(step_count - 1))
                if evaluation:
                    logged["held_out"] = evaluation.results["held_out"]
                log.write(step_count, logged)
            if due(run_config.save_every) or save_due or evaluation or stop:
                divergence_guard.check()
                store.save(state, batches.get_state(), primary_accuracy(evaluation.results) if evaluation else None)
                last_save = time.monotonic()
        store.close()
        seconds = time.monotonic() - start_time
        if not evaluation and not stop:
            evaluation = evaluate(frozen_params | state.params, preemption_guard)
    if evaluation is None:
        return None

    write_weights(out, program.config, state, task)
    expert_load = evaluation.expert_load
    summary = {
        "steps": step_count,
        "seconds": round(seconds, 1),
        "loss": logged["loss"],
        **evaluation.results,
        "expert_share": None if expert_load is None else rounded(expert_load.mean(axis=0)),
        "expert_share_by_layer": None if expert_load is None else rounded(expert_load),
        "mesh": dict(mesh.shape),
        "train_config": dataclasses.asdict(train_config),
        "versions": versions(),
    }
    if is_primary_process():
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def initial_params(program: TrainProgram, name: str, initial_model: Params | None = None) -> Params:
    """The "model" (`initial_model` if given), "adapters" or "aux_probe" of step 0, in the program's dtypes."""
    abstract = program.params[name]
    if name == "aux_probe":
        return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding), abstract)
    if name == "adapters" or initial_model is None:
        index, seed = ("model", "adapters").index(name), program.train_config.seed
        make = make_model(program.config, program.train_config)
        initial_model = sharding.init_params(make, seed, program.mesh, select=lambda params: split(params)[index])[1]
    return jax.tree.map(lambda p, shape: p.astype(shape.dtype), initial_model, abstract)


def compile_by_shape(program: Program, mesh: Mesh) -> Callable:
    """`program`, compiled for each new combination of array shapes."""
    compiled: dict[tuple, jax.stages.Compiled] = {}

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        shapes = (structure, *((x.shape, x.dtype) for x in leaves))
        if shapes not in compiled:
            compiled[shapes] = program.compile(args, mesh)
        return compiled[shapes](*args)

    return call


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """A host batch on the mesh, sharded along its batch dimension over data and fsdp."""

    def shard(x: np.ndarray) -> jax.Array:
        names = ("batch", *[None] * (x.ndim - 1))
        # Each process copies its own devices' shards; device_put would first compare the batch across processes.
        return jax.make_array_from_callback(x.shape, sharding.named_sharding(names, x.shape, mesh), x.__getitem__)

    return {key: shard(x) for key, x in batch.items()}


def make_evaluate(program: TrainProgram, task: Task) -> Callable[[Params, PreemptionGuard], Evaluation | None]:
    """A function from the parameters to their evaluation on the held-out examples; to None if preempted."""
    step, batch_size = compile_by_shape(program.eval_step, program.mesh), program.train_config.batch_size

    def evaluate(params: Params, preemption_guard: PreemptionGuard) -> Evaluation | None:
        correct, exists, expert_loads = [], [], []
        for batch in task.held_out(batch_size):
            if preemption_guard.should_stop():
                return None
            num_examples = len(batch["tokens"])
            # One shape, one compilation: a smaller batch is padded with copies of its first example.
            padding = batch_size - num_examples
            padded = {key: np.concatenate([x, np.repeat(x[:1], padding, axis=0)]) for key, x in batch.items()}
            answer_correct, answer_exists, expert_load = step(params, shard_batch(padded, program.mesh))
            correct.extend(np.asarray(answer_correct)[:num_examples])
            exists.extend(np.asarray(answer_exists)[:num_examples])
            expert_loads.append(np.asarray(expert_load))
        # All held-out examples may have been skipped.
        expert_load = np.mean(expert_loads, axis=0) if expert_loads else None
        return Evaluation(task.evaluate(correct, exists), expert_load)

    return evaluate


def write_weights(out: Path, config: SphinxConfig, state: TrainState, task: Task) -> None:
    """Write the model as a native checkpoint into the run directory, which `--checkpoint` then accepts.

    A LoRA run writes its adapters only; lora.json names their base.
    """
    if "adapters" in state.params:
        lora.save(out, state.params["adapters"])
        return
    partial = out / "weights.partial"
    native.save(partial, config, state.params["model"], task.tokenizer_files, overwrite=True)
    if not is_primary_process():
        return
    for written in sorted(partial.iterdir(), key=lambda path: path.is_file()):
        target = out / written.name
        if target.is_dir():
            shutil.rmtree(target)
        written.replace(target)
    partial.rmdir()


def rounded(values: np.ndarray) -> list:
    """Nested lists for JSON, to four decimal places."""
    return values.astype(np.float64).round(4).tolist()


def versions() -> dict[str, str]:
    """Versions of the libraries that determine the numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
