"""The training loop: one function, from a task and a mesh to a finished run directory."""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sharding
from sharding import is_primary_process
from sphinx_jax.checkpoints import lora
from sphinx_jax.checkpoints.formats import native
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.tasks import Task, primary_accuracy
from sphinx_jax.errors import UserError
from sphinx_jax.lora_params import join, split
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.auxiliary_probe import init_probe
from sphinx_jax.training.export import write_description
from sphinx_jax.training.guards import DivergenceGuard
from sphinx_jax.training.metrics import RunLog
from sphinx_jax.training.moments import MOMENTS
from sphinx_jax.training.preemption import PreemptionGuard, any_process
from sphinx_jax.training.profile import StepProfile
from sphinx_jax.training.program import TrainProgram, normalise_images, train_program
from sphinx_jax.training.step import Batch, Params, TrainState, make_eval_step
from sphinx_jax.training.train_config import TrainConfig, schedule
from sphinx_jax.training.train_state import CheckpointStore, init_state
from sphinx_jax.training.utilisation import peak_flops, step_flops

Evaluation = tuple[dict[str, Any], np.ndarray] | None
"""The task's held-out scores and the expert load [layers, experts]; None if preempted."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Checkpointing, logging, evaluation and profiling of a run: nothing here changes its numbers."""

    log_every: int = 20
    save_every: int = 500
    save_minutes: float = 15.0
    keep_last: int = 2
    keep_best: int = 1
    eval_every: int | None = None
    profile: range = range(0)
    """Steps, the first being 1, to record in OUT/profile."""


def train(
    config: SphinxConfig,
    task: Task,
    train_config: TrainConfig,
    mesh: Mesh,
    out: Path,
    *,
    run_config: RunConfig = RunConfig(),
    resume: bool = False,
    initial: Any = None,
) -> dict[str, Any] | None:
    """Train, evaluate on the held-out examples, write `out`, and return the content of its `summary.json`.

    Returns None if SIGTERM ended the run early; the state is saved then. `initial` are the model parameters to start
    from, on the mesh; by default they are initialised from the seed. A LoRA run does not save them, and needs them
    again to resume. `resume` continues from the newest checkpoint, if there is one yet. Raises UserError if a loss or
    gradient norm is not finite.
    """
    started = time.monotonic()
    program = train_program(config, train_config, mesh)
    options = sharding.compiler_options(mesh, slices_in_place=True)
    step = jax.jit(program.step, donate_argnums=0, compiler_options=options)
    if is_primary_process():
        write_description(out, config, task.tokenizer_bytes)
    batches = task.batches(train_config.batch_size, train_config.seed)
    store = CheckpointStore(out / "checkpoints", run_config.keep_last, run_config.keep_best)
    saved = store.restore(program.state) if resume else None
    frozen_params = {
        name: initial_params(name, config, program, train_config, mesh, initial) for name in program.frozen_params
    }
    if saved:
        state, position = saved
        batches.set_state(position)
    else:
        names = program.state.params
        params = {name: initial_params(name, config, program, train_config, mesh, initial) for name in names}
        state = init_state(params, program.optimizer, mesh)

    first_step = step_count = int(state.step)
    evaluate = make_evaluate(program.graph, task, train_config, mesh)
    divergence_guard = DivergenceGuard(out, store)
    profile = StepProfile(out / "profile", run_config.profile)
    saved_at = time.monotonic()
    stop, evaluation = False, None

    def due(step: int, every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == train_config.steps)

    @functools.cache
    def flops(text_len: int, has_images: bool) -> float:
        return step_flops(config, program, mesh, train_config, text_len, has_images).total

    run_log = RunLog(out, train_config.steps, first_step=first_step, peak_flops=peak_flops(mesh, train_config))
    with (
        sharding.mesh_context(mesh, program.rules, slices_in_place=True),
        PreemptionGuard() as preemption_guard,
        run_log as log,
    ):
        logged = log.last
        opt_state_mib = sharding.bytes_per_device(program.state.opt_state) / 2**20
        log.console.print(
            f"AdamW state: {MOMENTS[train_config.moments]}, {opt_state_mib:,.1f} MiB per device", highlight=False
        )
        while step_count < train_config.steps and not stop:
            try:
                batch = next(batches)
            except UserError:
                # A data error must not lose the steps before it.
                divergence_guard.check()
                store.save(state, batches.get_state())
                store.close()
                raise
            examples = [task.name(i) for i in batch.pop("examples")]
            with profile.before(step_count + 1):
                state, metrics = step(state, shard_batch(batch, mesh), frozen_params)
            step_count += 1
            profile.after(step_count, metrics)
            divergence_guard.record(step_count, metrics, examples)
            text_len, has_images = batch["tokens"].shape[1], "images" in batch
            num_tokens = train_config.batch_size * (text_len + config.num_image_tokens * has_images)
            log.count(step_count, num_tokens, train_config.batch_size * has_images, flops(text_len, has_images))
            minutes = (time.monotonic() - saved_at) / 60
            stop, save_due = any_process(preemption_guard.requested, minutes >= run_config.save_minutes)
            evaluation = None
            if due(step_count, run_config.eval_every) and not stop:
                divergence_guard.check()
                evaluation = evaluate(model_params(frozen_params | state.params), preemption_guard)
            if due(step_count, run_config.log_every) or evaluation:
                logged = {name: np.asarray(value).tolist() for name, value in metrics.items()}
                logged["lr"] = float(schedule(train_config)(step_count - 1))
                if evaluation:
                    logged["held_out"] = evaluation[0]["held_out"]
                log.write(step_count, logged)
            if due(step_count, run_config.save_every) or save_due or evaluation or stop:
                divergence_guard.check()
                store.save(state, batches.get_state(), primary_accuracy(evaluation[0]) if evaluation else None)
                saved_at = time.monotonic()
        store.close()
        trained = time.monotonic() - started
        evaluation = evaluation or (
            None if stop else evaluate(model_params(frozen_params | state.params), preemption_guard)
        )
    if evaluation is None:
        return None

    scores, expert_load = evaluation
    write_weights(out, config, state, task)
    summary = {
        "steps": step_count,
        "seconds": round(trained, 1),
        "loss": logged["loss"],
        **scores,
        "expert_share": rounded(expert_load.mean(axis=0)),
        "expert_share_by_layer": rounded(expert_load),
        "mesh": dict(mesh.shape),
        "train_config": dataclasses.asdict(train_config),
        "versions": versions(),
    }
    if is_primary_process():
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def initial_params(
    name: str, config: SphinxConfig, program: TrainProgram, train_config: TrainConfig, mesh: Mesh, initial: Any
) -> Params:
    """The "model", "adapters" or "aux_probe" of step 0, `initial` or newly initialised, in the program's dtypes."""
    shapes = program.params[name]
    if name == "aux_probe":
        return init_probe(shapes)

    def make(rngs: nnx.Rngs) -> SphinxMoE:
        return SphinxMoE(config, lora=train_config.lora, rngs=rngs)

    if name == "adapters":
        return sharding.init_params(make, train_config.seed, mesh, select=lambda params: split(params)[1])[1]
    if initial is None:
        initial = sharding.init_params(make, train_config.seed, mesh, select=lambda params: split(params)[0])[1]
    return jax.tree.map(lambda p, shape: p.astype(shape.dtype), initial, shapes)


def model_params(params: Params) -> Params:
    """The model's parameters, joined with the adapters of a LoRA run."""
    return join(params["model"], params.get("adapters", {}))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """A host batch on the mesh, sharded along its batch dimension over data and fsdp."""

    def shard(x: np.ndarray) -> jax.Array:
        names = ("batch", *[None] * (x.ndim - 1))
        # Each process copies its own devices' shards; device_put would first compare the batch across processes.
        return jax.make_array_from_callback(x.shape, sharding.named_sharding(names, x.shape, mesh), x.__getitem__)

    return {key: shard(x) for key, x in batch.items()}


def make_evaluate(
    graph: Any, task: Task, train_config: TrainConfig, mesh: Mesh
) -> Callable[[Params, PreemptionGuard], Evaluation]:
    """A function from the model's parameters to its `Evaluation` on the held-out examples."""
    # Replicated: each process reads all results.
    replicated = NamedSharding(mesh, PartitionSpec())
    eval_step, batch_size = make_eval_step(graph, jnp.dtype(train_config.dtype)), train_config.batch_size
    step = jax.jit(
        lambda params, batch: eval_step(params, normalise_images(batch)),
        out_shardings=replicated,
        compiler_options=sharding.compiler_options(mesh, slices_in_place=True),
    )

    def evaluate(params: Params, preemption_guard: PreemptionGuard) -> Evaluation:
        correct, exists, expert_loads = [], [], []
        for batch in task.held_out(batch_size):
            if any_process(preemption_guard.requested)[0]:
                return None
            num_examples = len(batch["tokens"])
            # One shape, one compilation: a smaller batch is padded with copies of its first example.
            padding = batch_size - num_examples
            padded = {key: np.concatenate([x, np.repeat(x[:1], padding, axis=0)]) for key, x in batch.items()}
            answer_correct, answer_exists, expert_load = step(params, shard_batch(padded, mesh))
            correct.extend(np.asarray(answer_correct)[:num_examples])
            exists.extend(np.asarray(answer_exists)[:num_examples])
            expert_loads.append(np.asarray(expert_load))
        return task.evaluate(correct, exists), np.mean(expert_loads, axis=0)

    return evaluate


def write_weights(out: Path, config: SphinxConfig, state: TrainState, task: Task) -> None:
    """Write the model as a native checkpoint into the run directory, which `--checkpoint` then accepts.

    A LoRA run writes its adapters only; lora.json names their base.
    """
    if "adapters" in state.params:
        lora.save(out, state.params["adapters"])
        return
    partial = out / "weights.partial"
    native.save(partial, config, state.params["model"], task.tokenizer_bytes, overwrite=True)
    if not is_primary_process():
        return
    for name in ("params", "tokenizer.model", "config.json"):
        target = out / name
        if target.is_dir():
            shutil.rmtree(target)
        (partial / name).replace(target)
    partial.rmdir()


def rounded(values: np.ndarray) -> list:
    """Nested lists for JSON, to four decimal places."""
    return values.astype(np.float64).round(4).tolist()


def versions() -> dict[str, str]:
    """Versions of the libraries that determine the numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
