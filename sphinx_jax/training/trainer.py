"""The training loop: flat, one function, from a task and a mesh to a finished run directory."""

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sharding
from sharding import is_primary_process
from sphinx_jax.checkpoints import lora
from sphinx_jax.checkpoints.formats import native
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.tasks import Task, first_score
from sphinx_jax.errors import UserError
from sphinx_jax.lora_params import join, split
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.auxiliary_probe import init_probe
from sphinx_jax.training.export import write_description
from sphinx_jax.training.guards import DivergenceGuard
from sphinx_jax.training.metrics import RunLog
from sphinx_jax.training.moments import MOMENTS
from sphinx_jax.training.preemption import PreemptionGuard, in_any_process
from sphinx_jax.training.profile import StepProfile
from sphinx_jax.training.program import TrainProgram, normalised, train_program
from sphinx_jax.training.step import Batch, Params, TrainState, make_eval_step
from sphinx_jax.training.train_config import TrainConfig, schedule
from sphinx_jax.training.train_state import StateStore, init_state
from sphinx_jax.training.utilisation import peak_flops, step_flops

Judgement = tuple[dict[str, Any], np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run does besides learning: nothing here changes its numbers."""

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
    """Train, evaluate on the held-out examples, write `out`, and return what is in its `summary.json`.

    Returns None where SIGTERM ended the run early; the state is saved then. `initial` are model parameters to
    start from, already on the mesh; by default they are drawn from the seed. Where adapters alone learn, their run
    does not save them, and needs them to go on. With `resume` the run goes on from its newest checkpoint, if it has
    one yet. Raises UserError where a loss or gradient is not finite.
    """
    started = time.monotonic()
    program = train_program(config, train_config, mesh)
    options = sharding.compiler_options(mesh, slices_in_place=True)
    step = jax.jit(program.step, donate_argnums=0, compiler_options=options)
    if is_primary_process():
        write_description(out, config, task.tokenizer_bytes)
    batches = task.batches(train_config.batch_size, train_config.seed)
    store = StateStore(out / "checkpoints", run_config.keep_last, run_config.keep_best)
    saved = store.restore(program.state) if resume else None
    frozen = {name: starting_params(name, config, program, train_config, mesh, initial) for name in program.frozen}
    if saved:
        state, position = saved
        batches.set_state(position)
    else:
        names = program.state.params
        params = {name: starting_params(name, config, program, train_config, mesh, initial) for name in names}
        state = init_state(params, program.optimizer, mesh)

    first = done = int(state.step)
    evaluate = make_evaluate(program.graph, task, train_config, mesh)
    watch = DivergenceGuard(out, store)
    profile = StepProfile(out / "profile", run_config.profile)
    saved_at = time.monotonic()
    due = lambda step, every: every is not None and (step % every == 0 or step == train_config.steps)
    stop, judged = False, None
    flops = functools.cache(
        lambda text, pictures: step_flops(config, program, mesh, train_config, text, pictures).total
    )
    run_log = RunLog(out, train_config.steps, first_step=first, peak_flops=peak_flops(mesh, train_config))
    with (
        sharding.mesh_context(mesh, program.rules, slices_in_place=True),
        PreemptionGuard() as interruption,
        run_log as log,
    ):
        logged = log.last
        held = sharding.bytes_per_device(program.state.optimizer) / 2**20
        log.console.print(
            f"AdamW keeps {MOMENTS[train_config.moments]}: {held:,.1f} MiB on each device", highlight=False
        )
        while done < train_config.steps and not stop:
            try:
                batch = next(batches)
            except UserError:
                # The data ends the run, not the state: what was learned so far is kept.
                watch.settle()
                store.save(state, batches.get_state())
                store.close()
                raise
            examples = [task.name(i) for i in batch.pop("examples")]
            with profile.before(done + 1):
                state, metrics = step(state, put(batch, mesh), frozen)
            done += 1
            profile.after(done, metrics)
            watch.follow(done, metrics, examples)
            text, pictures = batch["tokens"].shape[1], "images" in batch
            tokens = train_config.batch_size * (text + config.num_image_tokens * pictures)
            log.count(done, tokens, train_config.batch_size * pictures, flops(text, pictures))
            minutes = (time.monotonic() - saved_at) / 60
            stop, late = in_any_process(interruption.asked, minutes >= run_config.save_minutes)
            judged = None
            if due(done, run_config.eval_every) and not stop:
                watch.settle()
                judged = evaluate(model_of(frozen | state.params), interruption)
            if due(done, run_config.log_every) or judged:
                logged = {name: np.asarray(value).tolist() for name, value in metrics.items()}
                logged["lr"] = float(schedule(train_config)(done - 1))
                if judged:
                    logged["held_out"] = judged[0]["held_out"]
                log.write(done, logged)
            if due(done, run_config.save_every) or late or judged or stop:
                watch.settle()
                store.save(state, batches.get_state(), first_score(judged[0]) if judged else None)
                saved_at = time.monotonic()
        store.close()
        trained = time.monotonic() - started
        judged = judged or (None if stop else evaluate(model_of(frozen | state.params), interruption))
    if judged is None:
        return None

    scores, share = judged
    write_weights(out, config, state, task)
    summary = {
        "steps": done,
        "seconds": round(trained, 1),
        "loss": logged["loss"],
        **scores,
        "expert_share": rounded(share.mean(axis=0)),
        "expert_share_by_layer": rounded(share),
        "mesh": dict(mesh.shape),
        "recipe": dataclasses.asdict(train_config),
        "versions": versions(),
    }
    if is_primary_process():
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def starting_params(
    name: str, config: SphinxConfig, program: TrainProgram, train_config: TrainConfig, mesh: Mesh, initial: Any
) -> Params:
    """The "model", "adapters" or "attributes" of step 0: `initial` or freshly drawn, in the dtypes of the program."""
    shapes = program.params[name]
    if name == "attributes":
        return init_probe(shapes)
    make = lambda rngs: SphinxMoE(config, lora=train_config.lora, rngs=rngs)
    if name == "adapters":
        return sharding.init_params(make, train_config.seed, mesh, part=lambda params: split(params)[1])[1]
    if initial is None:
        initial = sharding.init_params(make, train_config.seed, mesh, part=lambda params: split(params)[0])[1]
    return jax.tree.map(lambda p, shape: p.astype(shape.dtype), initial, shapes)


def model_of(params: Params) -> Params:
    """The model's parameters, with its adapters if there are any."""
    return join(params["model"], params.get("adapters", {}))


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """A host batch on the mesh, its rows split over data and fsdp."""
    names = lambda x: ("batch", *[None] * (x.ndim - 1))
    # Each process puts its own devices' rows; device_put would compare the whole batch among them first.
    on_mesh = lambda x: jax.make_array_from_callback(
        x.shape, sharding.named_sharding(names(x), x.shape, mesh), lambda index: x[index]
    )
    return {key: on_mesh(x) for key, x in batch.items()}


def make_evaluate(
    graph: Any, task: Task, train_config: TrainConfig, mesh: Mesh
) -> Callable[[Params, PreemptionGuard], Judgement]:
    """A function from the model's parameters to the task's held-out scores, and each layer's share of words by
    expert, [layers, experts]; or to None as soon as the run is to be interrupted.
    """
    # Whole on every device: of several processes each reads all results.
    whole = NamedSharding(mesh, PartitionSpec())
    judge, batch_size = make_eval_step(graph, jnp.dtype(train_config.dtype)), train_config.batch_size
    step = jax.jit(
        lambda params, batch: judge(params, normalised(batch)),
        out_shardings=whole,
        compiler_options=sharding.compiler_options(mesh, slices_in_place=True),
    )

    def evaluate(params: Params, interruption: PreemptionGuard) -> Judgement:
        right, exists, shares = [], [], []
        for batch in task.held_out(batch_size):
            if in_any_process(interruption.asked)[0]:
                return None
            rows = len(batch["tokens"])
            # One shape, one compilation: a smaller batch is filled up with copies of its first row.
            filled = {key: np.concatenate([x, np.repeat(x[:1], batch_size - rows, axis=0)]) for key, x in batch.items()}
            correct, there, share = step(params, put(filled, mesh))
            right.extend(np.asarray(correct)[:rows])
            exists.extend(np.asarray(there)[:rows])
            shares.append(np.asarray(share))
        return task.score(right, exists), np.mean(shares, axis=0)

    return evaluate


def write_weights(out: Path, config: SphinxConfig, state: TrainState, task: Task) -> None:
    """The model as a native checkpoint in the run directory itself, so that the run is what `--checkpoint` takes.

    Of a run of adapters these alone are written: beside them lora.json says what they belong to.
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
    """As JSON, to four places."""
    return values.astype(np.float64).round(4).tolist()


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
