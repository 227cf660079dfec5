"""Parameters: abstract shapes with shardings, sharded initialisation, and bytes per device.

A parameter tree is nested dicts with arrays at the leaves (`nnx.to_pure_dict`): code that reads or writes it does not
depend on Flax.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sharding.axis_rules import DEFAULT_RULES, Rules, named_sharding

Params = dict[str, Any]


def abstract_params(
    make: Callable[[nnx.Rngs], nnx.Module],
    mesh: Mesh | AbstractMesh,
    rules: Rules = DEFAULT_RULES,
    dtype: DTypeLike | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """The module's graph definition, and its parameters as ShapeDtypeStructs with shardings. Nothing is allocated.

    `dtype` replaces the parameters' own. Raises LayoutError if the mesh does not fit the shapes.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)[:2]

    def leaf(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        value = variable.get_value()
        sharding = named_sharding(variable.get_metadata()["out_sharding"], value.shape, mesh, rules)
        return jax.ShapeDtypeStruct(value.shape, dtype or value.dtype, sharding=sharding)

    return graph, nnx.to_pure_dict(jax.tree.map(leaf, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def init_params(
    make: Callable[[nnx.Rngs], nnx.Module],
    seed: int,
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
    dtype: DTypeLike | None = None,
    select: Callable[[Params], Params] = lambda params: params,
) -> tuple[nnx.GraphDef, Params]:
    """The module's graph definition and initialised parameters; each device computes only its own shards.

    Only the parameters that `select` returns are initialised. Values depend on the seed alone, not on the mesh.
    """
    graph, abstract = abstract_params(make, mesh, rules, dtype)

    def init() -> Params:
        params = select(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(seed)), nnx.Param)))
        return jax.tree.map(lambda p: p if dtype is None else p.astype(dtype), params)

    return graph, jax.jit(init, out_shardings=shardings_of(select(abstract)))()


def shardings_of(tree: Any) -> Any:
    """The tree of shardings of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def bytes_per_device(tree: Any) -> int:
    """The bytes of a tree of arrays or abstract arrays on the device that holds most of it."""
    leaves = jax.tree.leaves(tree)
    bits = (math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in leaves)
    return sum(bits) // 8
