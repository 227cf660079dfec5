"""Parameters: their abstract shapes with shardings, made in place, and counted.

A parameter tree is nested dicts with arrays at the leaves (`nnx.to_pure_dict`), so that nothing that
reads or writes it depends on Flax.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from sharding.axis_rules import DEFAULT_RULES, Rules, named_sharding

Params = dict[str, Any]


def abstract_params(
    make: Callable[[nnx.Rngs], nnx.Module], mesh: Mesh, rules: Rules = DEFAULT_RULES, dtype: Any = None
) -> tuple[nnx.GraphDef, Params]:
    """The module's graph, and its parameters as ShapeDtypeStructs with shardings. Nothing is allocated.

    `dtype` replaces the parameters' own. Raises LayoutError where the mesh does not fit.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)[:2]

    def leaf(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        value = variable.get_value()
        sharding = named_sharding(variable.get_metadata()["out_sharding"], value.shape, mesh, rules)
        return jax.ShapeDtypeStruct(value.shape, dtype or value.dtype, sharding=sharding)

    is_variable = lambda x: isinstance(x, nnx.Variable)
    return graph, nnx.to_pure_dict(jax.tree.map(leaf, state, is_leaf=is_variable))


def init_params(
    make: Callable[[nnx.Rngs], nnx.Module],
    seed: int,
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
    dtype: Any = None,
    part: Callable[[Params], Params] = lambda params: params,
) -> tuple[nnx.GraphDef, Params]:
    """The module's graph and freshly drawn parameters, each device making only its own share.

    Only what `part` takes out of the tree is made. The values depend on the seed alone, not on the mesh.
    """
    graph, abstract = abstract_params(make, mesh, rules, dtype)

    def draw() -> Params:
        params = part(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(seed)), nnx.Param)))
        return jax.tree.map(lambda p: p if dtype is None else p.astype(dtype), params)

    return graph, jax.jit(draw, out_shardings=shardings_of(part(abstract)))()


def shardings_of(tree: Any) -> Any:
    """The sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def bytes_per_device(tree: Any) -> int:
    """Bytes that the busiest device holds of a tree of arrays or of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    bits = (math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in leaves)
    return sum(bits) // 8
