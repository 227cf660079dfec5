"""The one table from logical axis names to mesh axes, and what is made from it.

A model names the dimensions of its arrays ("heads", "mlp", "experts"); this table alone says over
which axes of the device mesh each name is split. Pass another table to `mesh_context` to lay a model out
differently.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.errors import LayoutError
from sharding.log_once import log_once

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one logical axis goes.

    `mesh_axes` are tried in order, each taken if it divides what is left of the dimension. What happens
    to a mesh axis that does not divide is `otherwise`: "error"; "copy", every device along it keeps
    the whole (said once in the log); or names of logical axes, of which the first that the same array
    has takes it over, so that stored bytes still shrink.
    """

    mesh_axes: tuple[str, ...]
    otherwise: str | tuple[str, ...] = "error"


Rules = Mapping[str, Rule]

# Heads go to `tensor` before `expert`: with more devices than key/value heads, the devices that share
# a key/value head are then the ones that hold its query heads.
_MODEL = ("tensor", "expert")

DEFAULT_RULES: Rules = {
    # Activations.
    "batch": Rule(("data", "fsdp"), "copy"),
    "sequence": Rule(()),
    "residual": Rule(()),
    # Parameters of the language model.
    "embed": Rule(("fsdp",)),
    # Past the number of key/value heads, the devices that share one take different query heads of its group;
    # where those stand beside keys and values in one array, its other dimension is split.
    "kv_heads": Rule(_MODEL, ("queries", "embed")),
    "queries": Rule(()),
    "head_dim": Rule(()),
    "mlp": Rule(("tensor",)),
    "experts": Rule(("expert",)),
    "vocab": Rule(_MODEL),
    "vocab_rows": Rule(("fsdp",)),
    "channels": Rule(_MODEL),
    "layers": Rule(()),
    # Too small to be worth a collective.
    "norm": Rule(()),
    "embed_small": Rule(()),
    # Vision: sizes are the encoders' own, so an axis that does not divide goes elsewhere.
    "vision_embed": Rule(("fsdp",), "copy"),
    "vision_heads": Rule(_MODEL, ("vision_embed",)),
    "vision_mlp": Rule(_MODEL, "copy"),
    "vision_channels": Rule(_MODEL, "copy"),
}


SEQUENCE_PARALLEL_RULES: Rules = {**DEFAULT_RULES, "residual": Rule(_MODEL, "copy")}
"""The residual stream split along the sequence between blocks (https://arxiv.org/abs/2205.05198): each model-parallel
device keeps, norms and adds its own part, and a sum over them is scattered and later gathered instead of copied. A
sequence that does not divide is copied as far as it does not."""


def partition_spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> P:
    """The PartitionSpec of an array whose dimensions carry `names` (None: whole on every device).

    Raises LayoutError on a name that the table lacks, on two dimensions that claim one mesh axis, and on
    a dimension that a mesh axis does not divide where the rule allows no way out.
    """
    if len(names) != len(shape):
        raise LayoutError(f"{len(shape)} dimensions {shape} but {len(names)} names {names}")
    placed: list[list[str]] = [[] for _ in names]
    owner: dict[str, str] = {}

    def split(dim: int, axis: str) -> bool:
        """Split dimension `dim` over mesh axis `axis` too, if it divides."""
        factor = math.prod(mesh.shape[a] for a in placed[dim]) * mesh.shape[axis]
        if shape[dim] % factor:
            return False
        if axis in owner:
            raise LayoutError(
                f"dimensions {owner[axis]!r} and {names[dim]!r} of one array {names} both claim mesh axis {axis!r}"
            )
        owner[axis] = names[dim]
        placed[dim].append(axis)
        return True

    left_over: list[tuple[int, str]] = []
    for dim, name in enumerate(names):
        if name is None:
            continue
        if name not in rules:
            raise LayoutError(f"unknown logical axis {name!r} in {names}; the table knows {sorted(rules)}")
        for axis in rules[name].mesh_axes:
            if mesh.shape[axis] > 1 and not split(dim, axis):
                left_over.append((dim, axis))
    for dim, axis in left_over:
        name, otherwise = names[dim], rules[names[dim]].otherwise
        if otherwise == "error":
            raise LayoutError(
                f"{name!r} of size {shape[dim]} is not divisible by mesh axis {axis!r} of size {mesh.shape[axis]}"
                f" (after {placed[dim] or 'no other axis'}); sizes that fit: {_divisors(shape[dim], placed[dim], mesh)}"
            )
        instead = () if otherwise == "copy" else [other for other in otherwise if other in names]
        if taken := next((other for other in instead if split(names.index(other), axis)), None):
            log_once(log, f"{names} {shape}: {name!r} does not divide over {axis!r}, {taken!r} is split instead")
        else:
            log_once(log, f"{names} {shape}: {name!r} does not divide over {axis!r}, each device keeps a copy")
    return P(*(tuple(axes) if len(axes) > 1 else (axes[0] if axes else None) for axes in placed))


def _divisors(size: int, placed: list[str], mesh: Mesh) -> list[int]:
    rest = size // math.prod(mesh.shape[a] for a in placed)
    return [n for n in range(1, rest + 1) if rest % n == 0]


def named_sharding(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """`partition_spec` on its mesh."""
    return NamedSharding(mesh, partition_spec(names, shape, mesh, rules))


def num_shards(name: str, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> int:
    """Into how many parts `mesh` splits a logical axis that all of its rule's mesh axes divide."""
    return math.prod(mesh.shape[axis] for axis in rules[name].mesh_axes)
