"""The training loop: flat, one function, from a task and a mesh to a finished run directory."""

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sharding
from sphinx_jax.checkpoints import native
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.task import Task
from sphinx_jax.errors import UserError
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.attributes import init_probe
from sphinx_jax.training.metrics import RunLog
from sphinx_jax.training.program import normalised, train_program
from sphinx_jax.training.recipe import Recipe, schedule
from sphinx_jax.training.state import StateStore, init_state
from sphinx_jax.training.step import Batch, Params, TrainState, make_eval_step


def train(
    config: SphinxConfig,
    task: Task,
    recipe: Recipe,
    mesh: Mesh,
    out: Path,
    *,
    resume: bool = False,
    initial: Any = None,
    save_every: int = 500,
    log_every: int = 20,
) -> dict[str, Any]:
    """Train, evaluate on the held-out examples, write `out`, and return what is in its `summary.json`.

    `initial` are model parameters to start from, already on the mesh; by default they are drawn from the seed.
    Raises UserError where the loss is not finite or there is nothing to resume.
    """
    started = time.monotonic()
    program = train_program(config, recipe, mesh)
    step = jax.jit(program.step, donate_argnums=0)
    batches = task.batches(recipe.batch_size, recipe.seed)
    store = StateStore(out / "checkpoints")
    if resume:
        state, position = store.restore(program.state)
        batches.set_state(position)
    else:
        state = init_state(starting_params(config, program.params, recipe.seed, mesh, initial), program.optimizer, mesh)

    first = done = int(state.step)
    with sharding.use(mesh), RunLog(out, recipe.steps, first_step=first) as log:
        logged = log.last
        while done < recipe.steps:
            batch = put(next(batches), mesh)
            state, metrics = step(state, batch)
            done += 1
            words = batch["tokens"].shape[1] + (config.image_words if "images" in batch else 0)
            log.count(done, recipe.batch_size * words)
            if done % log_every == 0 or done == recipe.steps:
                logged = {name: np.asarray(value).tolist() for name, value in metrics.items()}
                logged["lr"] = float(schedule(recipe)(done - 1))
                log.write(done, logged)
                if not np.isfinite(logged["loss"]):
                    raise UserError(
                        f"the loss is {logged['loss']} at step {done}; lower --lr, or continue before it from "
                        f"{out / 'checkpoints'} with --resume"
                    )
            if done % save_every == 0 and done < recipe.steps:
                store.save(state, batches.get_state())
        if done > first:
            store.save(state, batches.get_state())
        store.close()
        trained = time.monotonic() - started
        scores, share = evaluate(program.graph, state, task, recipe, mesh)

    write_weights(out, config, state, task)
    summary = {
        "steps": done,
        "seconds": round(trained, 1),
        "loss": logged["loss"],
        **scores,
        "expert_share": rounded(share.mean(axis=0)),
        "expert_share_by_layer": rounded(share),
        "mesh": dict(mesh.shape),
        "recipe": dataclasses.asdict(recipe),
        "versions": versions(),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def starting_params(config: SphinxConfig, shapes: Params, seed: int, mesh: Mesh, initial: Any) -> Params:
    """The parameters of step 0: `initial` or freshly drawn ones, in the dtypes that `shapes` asks for."""
    if initial is None:
        initial = sharding.init_params(lambda rngs: SphinxMoE(config, rngs=rngs), seed, mesh)[1]
    model = jax.tree.map(lambda p, shape: p.astype(shape.dtype), initial, shapes["model"])
    return {"model": model, "attributes": init_probe(shapes["attributes"])}


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """A host batch on the mesh, its rows split over data and fsdp."""
    names = lambda x: ("batch", *[None] * (x.ndim - 1))
    return {key: jax.device_put(x, sharding.place(names(x), x.shape, mesh)) for key, x in batch.items()}


def evaluate(graph, state: TrainState, task: Task, recipe: Recipe, mesh: Mesh) -> tuple[dict[str, Any], np.ndarray]:
    """The task's held-out scores, and each layer's share of words by expert, [layers, experts]."""
    judge, batch_size = make_eval_step(graph, jnp.dtype(recipe.dtype)), recipe.batch_size
    step = jax.jit(lambda params, batch: judge(params, normalised(batch)))
    right, exists, shares = [], [], []
    for batch in task.held_out(batch_size):
        rows = len(batch["tokens"])
        # One shape, one compilation: a smaller batch is filled up with copies of its first row.
        filled = {key: np.concatenate([x, np.repeat(x[:1], batch_size - rows, axis=0)]) for key, x in batch.items()}
        correct, there, share = step(state.params["model"], put(filled, mesh))
        right.extend(np.asarray(correct)[:rows])
        exists.extend(np.asarray(there)[:rows])
        shares.append(np.asarray(share))
    return task.score(right, exists), np.mean(shares, axis=0)


def write_weights(out: Path, config: SphinxConfig, state: TrainState, task: Task) -> None:
    """The model as a native checkpoint in the run directory itself, so that the run is what `--checkpoint` takes."""
    partial = out / "weights.partial"
    native.save(partial, config, state.params["model"], task.tokenizer_bytes, overwrite=True)
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
