"""The train state: its shardings and initialisation."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import shardings_of
from sphinx_jax.training.step import Params, TrainState


def abstract_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The abstract train state of (abstract) parameters: each moment is sharded like its parameter.

    So are the means along one dimension of a parameter (factored moments).
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)

    def keys(path: tuple) -> tuple:
        return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))

    by_path = {keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}

    def with_sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment's path ends with its parameter's path, after a prefix from the optimizer.
        names = keys(path)
        param = next((by_path[names[n:]] for n in range(len(names)) if names[n:] in by_path), None)
        sharding = replicated if param is None else _moment_sharding(param, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    moments = jax.tree_util.tree_map_with_path(with_sharding, jax.eval_shape(optimizer.init, abstract))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), abstract, moments)


def _moment_sharding(param: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an optimizer array of `shape` that belongs to a parameter.

    A full moment has the parameter's sharding, and means along one dimension that of the remaining dimensions, each
    replicated where its mesh axes do not divide it. Any other array is replicated.
    """
    mesh, rank = param.sharding.mesh, len(param.shape)
    axes = [*param.sharding.spec, *[None] * (rank - len(param.sharding.spec))]
    if len(shape) == rank - 1:
        # Of two equal dimensions either may be the missing one; the wrong guess only costs a resharding.
        missing = next((d for d in reversed(range(rank)) if param.shape[:d] + param.shape[d + 1 :] == shape), None)
        axes = [] if missing is None else axes[:missing] + axes[missing + 1 :]
    elif shape != param.shape:
        axes = []

    def num_shards(axis: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))

    divisible = (axis if size % num_shards(axis) == 0 else None for axis, size in zip(axes, shape, strict=False))
    return NamedSharding(mesh, PartitionSpec(*divisible))


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The train state of step 0, the optimizer state created with its shardings."""
    shardings = shardings_of(abstract_state(params, optimizer, mesh))
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step, params, jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params))
