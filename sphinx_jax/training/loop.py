"""The training loop: flat, one function, from a task and a mesh to a finished run directory."""

import dataclasses
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
from sphinx_jax.checkpoints import native
from sphinx_jax.checkpoints.writing import is_lead
from sphinx_jax.config import SphinxConfig
from sphinx_jax.data.images import CLIP_MEAN, CLIP_STD
from sphinx_jax.data.task import Task, first_score
from sphinx_jax.errors import UserError
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.attributes import init_probe
from sphinx_jax.training.divergence import DivergenceWatch
from sphinx_jax.training.export import write_description
from sphinx_jax.training.interruption import Interruption, in_any_process
from sphinx_jax.training.metrics import RunLog
from sphinx_jax.training.optimizer import Stage, adamw, cosine_with_warmup, learns, map_with_path, only
from sphinx_jax.training.profile import StepProfile
from sphinx_jax.training.state import StateStore, abstract_state, init_state
from sphinx_jax.training.step import Batch, Params, TrainState, make_eval_step, make_loss, make_train_step

Judgement = tuple[dict[str, Any], np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train: everything that changes the numbers of a run besides the model and the data."""

    steps: int
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 3e-3
    min_lr: float = 0.0
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    attribute_weight: float = 0.0
    stage: Stage = "everything"
    remat: str = "none"
    dtype: str = "float32"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Upkeep:
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
    recipe: Recipe,
    mesh: Mesh,
    out: Path,
    *,
    upkeep: Upkeep = Upkeep(),
    resume: bool = False,
    initial: Any = None,
) -> dict[str, Any] | None:
    """Train, evaluate on the held-out examples, write `out`, and return what is in its `summary.json`.

    Returns None where SIGTERM ended the run early; the state is saved then. `initial` are model parameters to
    start from, already on the mesh; by default they are drawn from the seed. With `resume` the run goes on from
    its newest checkpoint, if it has one yet. Raises UserError where a loss or gradient is not finite.
    """
    started = time.monotonic()
    make = lambda rngs: SphinxMoE(config, rngs=rngs)
    graph, abstract = sharding.abstract_params(make, mesh)
    probe = init_probe(config.language.dim, mesh) if recipe.attribute_weight else {}
    shapes = {"model": abstract, "attributes": probe}
    flags = map_with_path(lambda path, _: learns(path, recipe.stage), abstract)
    optimizer = adamw(schedule(recipe), weight_decay=recipe.weight_decay, clip_norm=recipe.clip_norm)
    optimizer = only(optimizer, {"model": flags, "attributes": dict.fromkeys(probe, True)})
    loss = make_loss(
        graph,
        config,
        flags=flags,
        attribute_weight=recipe.attribute_weight,
        remat=recipe.remat,
        dtype=jnp.dtype(recipe.dtype),
    )
    prepared_loss = lambda params, batch: loss(params, normalised(batch))
    step = jax.jit(
        make_train_step(prepared_loss, optimizer, sharding.shardings_of(shapes), recipe.accumulate), donate_argnums=0
    )
    if is_lead():
        write_description(out, config, task.tokenizer_bytes)
    batches = task.batches(recipe.batch_size, recipe.seed)
    store = StateStore(out / "checkpoints", upkeep.keep_last, upkeep.keep_best)
    saved = store.restore(abstract_state(shapes, optimizer, mesh)) if resume else None
    if saved:
        state, position = saved
        batches.set_state(position)
    else:
        model = sharding.init_params(make, recipe.seed, mesh)[1] if initial is None else initial
        state = init_state({"model": model, "attributes": probe}, optimizer, mesh)

    first = done = int(state.step)
    evaluate = make_evaluate(graph, task, recipe.batch_size, mesh)
    watch = DivergenceWatch(out, store)
    profile = StepProfile(out / "profile", upkeep.profile)
    saved_at = time.monotonic()
    due = lambda step, every: every is not None and (step % every == 0 or step == recipe.steps)
    stop, judged = False, None
    with sharding.use(mesh), Interruption() as interruption, RunLog(out, recipe.steps, first_step=first) as log:
        logged = log.last
        while done < recipe.steps and not stop:
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
                state, metrics = step(state, put(batch, mesh))
            done += 1
            profile.after(done, metrics)
            watch.follow(done, metrics, examples)
            words = batch["tokens"].shape[1] + (config.image_words if "images" in batch else 0)
            log.count(done, recipe.batch_size * words, recipe.batch_size if "images" in batch else 0)
            minutes = (time.monotonic() - saved_at) / 60
            stop, late = in_any_process(interruption.asked, minutes >= upkeep.save_minutes)
            judged = None
            if due(done, upkeep.eval_every) and not stop:
                watch.settle()
                judged = evaluate(state.params["model"], interruption)
            if due(done, upkeep.log_every) or judged:
                logged = {name: np.asarray(value).tolist() for name, value in metrics.items()}
                logged["lr"] = float(schedule(recipe)(done - 1))
                if judged:
                    logged["held_out"] = judged[0]["held_out"]
                log.write(done, logged)
            if due(done, upkeep.save_every) or late or judged or stop:
                watch.settle()
                store.save(state, batches.get_state(), first_score(judged[0]) if judged else None)
                saved_at = time.monotonic()
        store.close()
        trained = time.monotonic() - started
        judged = judged or (None if stop else evaluate(state.params["model"], interruption))
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
        "recipe": dataclasses.asdict(recipe),
        "versions": versions(),
    }
    if is_lead():
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def check_batch(recipe: Recipe, mesh: Mesh) -> None:
    """Raises UserError unless each part of the batch divides over the mesh."""
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = recipe.accumulate * replicas
    if recipe.batch_size % parts:
        near = max(recipe.batch_size // parts, 1) * parts
        raise UserError(
            f"--batch-size {recipe.batch_size} does not divide into --accumulate {recipe.accumulate} parts over "
            f"{replicas} devices of data x fsdp; try --batch-size {near}"
        )


def schedule(recipe: Recipe):
    """Learning rate by optimizer step. Step 0 already learns: the warm-up is taken one step ahead."""
    # A run no longer than the warm-up ends in it.
    end = max(recipe.steps, recipe.warmup_steps + 1)
    return lambda step: cosine_with_warmup(
        step + 1, lr=recipe.lr, min_lr=recipe.min_lr, warmup_epochs=recipe.warmup_steps, epochs=end
    )


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """A host batch on the mesh, its rows split over data and fsdp."""
    names = lambda x: ("batch", *[None] * (x.ndim - 1))
    return {key: jax.device_put(x, sharding.place(names(x), x.shape, mesh)) for key, x in batch.items()}


def normalised(batch: Batch) -> Batch:
    """The batch with uint8 pictures turned to float32 with CLIP's statistics, on the device."""
    if "images" not in batch:
        return batch
    pixels = batch["images"].astype(jnp.float32) / 255
    return batch | {"images": (pixels - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)}


def make_evaluate(graph: Any, task: Task, batch_size: int, mesh: Mesh) -> Callable[[Params, Interruption], Judgement]:
    """A function from the model's parameters to the task's held-out scores, and each layer's share of words by
    expert, [layers, experts]; or to None as soon as the run is to be interrupted.
    """
    # Whole on every device: of several processes each reads all results.
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(lambda params, batch: make_eval_step(graph)(params, normalised(batch)), out_shardings=whole)

    def evaluate(params: Params, interruption: Interruption) -> Judgement:
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
    """The model as a native checkpoint in the run directory itself, so that the run is what `--checkpoint` takes."""
    partial = out / "weights.partial"
    native.save(partial, config, state.params["model"], task.tokenizer_bytes, overwrite=True)
    if not is_lead():
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
