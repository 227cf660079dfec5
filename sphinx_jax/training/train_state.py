"""The train state: where each part of it lives, making it, saving it and taking it up again."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from sharding import shardings_of
from sphinx_jax.training.step import Params, TrainState


def abstract_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the train state of (abstract) parameters: each moment lies where its parameter does.

    So does what is smaller than the parameter: means along one of its dimensions, and scales of blocks.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    keys = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    by_path = {keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment stands under its parameter's path, behind whatever the optimizer puts in front.
        names = keys(path)
        param = next((by_path[names[n:]] for n in range(len(names)) if names[n:] in by_path), None)
        beside = everywhere if param is None else _beside(param, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=beside)

    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    moments = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(optimizer.init, abstract))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), abstract, moments)


def _beside(param: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> NamedSharding:
    """Where something of `shape` lies that belongs to a parameter.

    It has the parameter's dimensions, fewer along one of them where it is of blocks, or lacks one of them where it is
    of means. A dimension that its mesh axes do not divide stays whole; what is neither, too.
    """
    mesh, dims = param.sharding.mesh, len(param.shape)
    axes = [*param.sharding.spec, *[None] * (dims - len(param.sharding.spec))]
    if len(shape) == dims - 1:
        # Of two equal dimensions either may be the one that is gone: at worst it is laid out otherwise than best.
        gone = next((d for d in reversed(range(dims)) if param.shape[:d] + param.shape[d + 1 :] == shape), None)
        axes = [] if gone is None else axes[:gone] + axes[gone + 1 :]
    elif len(shape) != dims or any(whole % part for whole, part in zip(param.shape, shape, strict=True)):
        axes = []
    parts = lambda axis: math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
    fitting = (axis if size % parts(axis) == 0 else None for axis, size in zip(axes, shape, strict=False))
    return NamedSharding(mesh, PartitionSpec(*fitting))


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Step 0, with the optimizer's state made where it lives."""
    shardings = shardings_of(abstract_state(params, optimizer, mesh))
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params))


class StateStore:
    """Checkpoints of a run under `directory`/STEP, written in the background and renamed into place when whole.

    Kept are the newest `keep_last`, and the `keep_best` of those saved with the highest scores.
    """

    def __init__(self, directory: Path, keep_last: int = 2, keep_best: int = 1):
        newest = checkpoint_managers.LatestN(n=keep_last)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["score"], n=keep_best, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                # What a killed process left half written.
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, data_position: dict[str, Any], score: float | None = None) -> None:
        """Save the state, and where the data iterator stands; `score` is of held-out examples, higher is better."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position)),
            metrics=None if score is None else {"score": score},
        )

    def newest(self) -> Path | None:
        """The newest whole checkpoint, once a save under way is done."""
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        return None if step is None else Path(self._manager.directory) / str(step)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint, laid out as `abstract` says, whatever mesh wrote it; None if there is none yet."""
        step = self._manager.latest_step()
        if step is None:
            return None
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()),
        )
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Wait for the last save to be whole."""
        self._manager.wait_until_finished()
        self._manager.close()
