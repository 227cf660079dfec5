"""The table from logical axis names to mesh axes, and the PartitionSpecs derived from it.

A model names the dimensions of its arrays ("heads", "mlp", "experts"). This table alone says which mesh axes shard
each name. Pass another table to `mesh_context` to shard a model differently.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.errors import LayoutError
from sharding.log_once import log_once

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rule:
    """The mesh axes that shard one logical axis.

    `mesh_axes` are tried in order; each one applies if it divides the remaining size of the dimension. `fallback`
    says what happens to a mesh axis that does not divide: "error" raises; "copy" replicates the dimension along it
    (logged once); a tuple of logical axes moves the mesh axis to the first of them that the same array has, so that
    the bytes per device still shrink.
    """

    mesh_axes: tuple[str, ...]
    fallback: str | tuple[str, ...] = "error"


Rules = Mapping[str, Rule]

# Heads are sharded over `tensor` before `expert`: with more devices than key/value heads, the devices that replicate
# a key/value head are then the ones that hold its query heads.
_MODEL = ("tensor", "expert")

DEFAULT_RULES: Rules = {
    # Activations.
    "batch": Rule(("data", "fsdp"), "copy"),
    "sequence": Rule(()),
    "residual": Rule(()),
    # Parameters of the language model.
    "embed": Rule(("fsdp",)),
    # Beyond the number of key/value heads, the devices that replicate one shard the query heads of its group. In
    # `wqkv`, where queries, keys and values are one array, they shard its "embed" dimension instead.
    "kv_heads": Rule(_MODEL, ("queries", "embed")),
    "queries": Rule(()),
    "head_dim": Rule(()),
    "mlp": Rule(("tensor",)),
    "experts": Rule(("expert",)),
    # Of one expert that is an array of its own.
    "expert_mlp": Rule(_MODEL),
    "vocab": Rule(_MODEL),
    "vocab_rows": Rule(("fsdp",)),
    "channels": Rule(_MODEL),
    "layers": Rule(()),
    # Too small to be worth a collective.
    "norm": Rule(()),
    "embed_small": Rule(()),
    # Vision: sizes are the encoders' own, so an axis that does not divide falls back instead of raising.
    "vision_embed": Rule(("fsdp",), "copy"),
    "vision_heads": Rule(_MODEL, ("vision_embed",)),
    "vision_mlp": Rule(_MODEL, "copy"),
    "vision_channels": Rule(_MODEL, "copy"),
}


SEQUENCE_PARALLEL_RULES: Rules = {**DEFAULT_RULES, "residual": Rule(_MODEL, "copy")}
"""Sequence parallelism (https://arxiv.org/abs/2205.05198): the residual stream is sharded along the sequence between
blocks. Each model-parallel device stores, normalises and adds its own positions; each all-reduce becomes a
reduce-scatter and a later all-gather. A sequence that a mesh axis does not divide is replicated along it."""


def partition_spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES
) -> P:
    """The PartitionSpec of an array whose dimensions carry `names` (None: not sharded).

    Raises LayoutError on a name that the table lacks, on two dimensions that claim one mesh axis, and on a dimension
    that a mesh axis does not divide where the rule's fallback is "error".
    """
    if len(names) != len(shape):
        raise LayoutError(f"{len(shape)} dimensions {shape} but {len(names)} names {names}")
    assigned: list[list[str]] = [[] for _ in names]
    owner: dict[str, int] = {}

    def split(dim: int, axis: str) -> bool:
        """Shard dimension `dim` over mesh axis `axis` too; False if it does not divide."""
        factor = math.prod(mesh.shape[a] for a in assigned[dim]) * mesh.shape[axis]
        if shape[dim] % factor:
            return False
        if axis in owner:
            other = names[owner[axis]]
            raise LayoutError(
                f"dimensions {other!r} and {names[dim]!r} of one array {names} both claim mesh axis {axis!r}"
            )
        owner[axis] = dim
        assigned[dim].append(axis)
        return True

    # Mesh axes that do not divide their dimension wait until every other dimension has taken its own.
    indivisible: list[tuple[int, str, str]] = []
    for dim, name in enumerate(names):
        if name is None:
            continue
        if name not in rules:
            raise LayoutError(f"unknown logical axis {name!r} in {names}; the table knows {sorted(rules)}")
        for axis in rules[name].mesh_axes:
            if mesh.shape[axis] > 1 and not split(dim, axis):
                indivisible.append((dim, name, axis))
    for dim, name, axis in indivisible:
        fallback = rules[name].fallback
        if fallback == "error":
            fitting = _divisors(shape[dim], assigned[dim], mesh)
            raise LayoutError(
                f"{name!r} of size {shape[dim]} is not divisible by mesh axis {axis!r} of size {mesh.shape[axis]}"
                f" (after {assigned[dim] or 'no other axis'}); sizes that fit: {fitting}"
            )
        candidates = () if fallback == "copy" else [other for other in fallback if other in names]
        if replacement := next((other for other in candidates if split(names.index(other), axis)), None):
            log_once(log, f"{names} {shape}: {axis!r} does not divide {name!r}, it shards {replacement!r} instead")
        else:
            log_once(log, f"{names} {shape}: {axis!r} does not divide {name!r}, which is replicated along it")
    return P(*(tuple(axes) if len(axes) > 1 else (axes[0] if axes else None) for axes in assigned))


def _divisors(size: int, assigned: list[str], mesh: Mesh | AbstractMesh) -> list[int]:
    """Mesh axis sizes that divide what is left of a dimension of `size` after the axes `assigned`."""
    remaining = size // math.prod(mesh.shape[axis] for axis in assigned)
    return [n for n in range(1, remaining + 1) if remaining % n == 0]


def named_sharding(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """The NamedSharding of `partition_spec` on `mesh`."""
    return NamedSharding(mesh, partition_spec(names, shape, mesh, rules))


def num_shards(name: str, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> int:
    """Number of shards of a logical axis on `mesh`, if all mesh axes of its rule divide it."""
    return math.prod(mesh.shape[axis] for axis in rules[name].mesh_axes)
