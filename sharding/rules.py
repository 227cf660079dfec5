"""The one table from logical axis names to mesh axes, and what is made from it.

A model names the dimensions of its arrays ("heads", "mlp", "experts"); this table alone says over
which axes of the device mesh each name is split. Pass another table to `use` to lay a model out
differently.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import xla_options
from sharding.errors import LayoutError

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


@functools.lru_cache(maxsize=4096)
def _say_once(message: str) -> None:
    log.info(message)


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = DEFAULT_RULES) -> P:
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
            _say_once(f"{names} {shape}: {name!r} does not divide over {axis!r}, {taken!r} is split instead")
        else:
            _say_once(f"{names} {shape}: {name!r} does not divide over {axis!r}, each device keeps a copy")
    return P(*(tuple(axes) if len(axes) > 1 else (axes[0] if axes else None) for axes in placed))


def _divisors(size: int, placed: list[str], mesh: Mesh) -> list[int]:
    rest = size // math.prod(mesh.shape[a] for a in placed)
    return [n for n in range(1, rest + 1) if rest % n == 0]


def place(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """`spec` on its mesh."""
    return NamedSharding(mesh, spec(names, shape, mesh, rules))


_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("layout", default=None)
_in_place: contextvars.ContextVar[bool] = contextvars.ContextVar("slices in place", default=False)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = DEFAULT_RULES, slices_in_place: bool = False) -> Iterator[None]:
    """Within this context, `constrain` and `per_device` lay arrays out on `mesh`. Outside, they do nothing.

    Trace (first call a jitted function) inside it: the layout is part of the compiled program. `slices_in_place` says
    that it will be compiled with the options of that name.
    """
    token, in_place = _active.set((mesh, rules)), _in_place.set(slices_in_place)
    try:
        yield
    finally:
        _active.reset(token)
        _in_place.reset(in_place)


def platform() -> str:
    """What is compiled for: "cpu", "gpu" or "cuda" (a GPU known by description only); jax's own outside of a mesh."""
    active = _active.get()
    return active[0].devices.flat[0].platform if active else jax.default_backend()


def compute_capability() -> str | None:
    """Of the GPU that is compiled for, such as "9.0"; None where it is none."""
    return getattr(_device(), "compute_capability", None)


def multiprocessors() -> int:
    """Of the GPU that is compiled for; 1 where it is none."""
    return getattr(_device(), "core_count", 1)


def reads_slices_in_place() -> bool:
    """Whether products read a fixed slice of a stack of matrices in place (`xla_options.reads_slices_in_place`)."""
    return _in_place.get() and xla_options.reads_slices_in_place(_device())


def _device() -> jax.Device:
    active = _active.get()
    return active[0].devices.flat[0] if active else jax.devices()[0]


def device_count() -> int:
    """How many devices the mesh in use has; 1 outside of a mesh."""
    active = _active.get()
    return active[0].size if active else 1


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out as the names of its dimensions say."""
    active = _active.get()
    if active is None or active[0].size == 1:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, place(names, x.shape, mesh, rules))


def per_device(
    body: Callable[..., jax.Array],
    in_names: tuple[tuple[str | None, ...], ...],
    out_names: tuple[str | None, ...],
    sum_over: tuple[str, ...],
    gather: tuple[str, ...] = (),
) -> Callable[..., jax.Array]:
    """`body` run on each device's own part of its arguments, results added over the devices that split `sum_over`.

    The names say how each argument and the result are split; a parameter that is stored split further (by
    fsdp) is gathered on entry. An argument may be a tree: its arrays are split alike, but for dimensions of which
    they have one element only. `body` sees dimensions named in `gather` whole; where the result has one that is
    split over devices whose results are added, each of them gets its part of the sum. Without a mesh it is `body`
    itself.
    """
    active = _active.get()
    if active is None or active[0].size == 1:
        return body
    mesh, rules = active
    axes = tuple(axis for name in sum_over for axis in rules[name].mesh_axes if mesh.shape[axis] > 1)

    def split_like(names: tuple[str | None, ...], arg: Any) -> Any:
        more_than_one = lambda array: tuple(n if size > 1 else None for n, size in zip(names, array.shape, strict=True))
        return jax.tree.map(lambda array: spec(more_than_one(array), array.shape, mesh, rules), arg)

    def call(*args: Any) -> jax.Array:
        in_specs = tuple(split_like(n, a) for n, a in zip(in_names, args, strict=True))
        # The result's batch is split like the first argument's.
        out_spec = spec(out_names, args[0].shape, mesh, rules)
        used = set().union(*(_mesh_axes(s) for s in jax.tree.leaves(in_specs)))

        def on_device(*parts: Any) -> jax.Array:
            # Each device's copy counts as its own from here on, so that gradients of what is shared
            # are added up once, where the copies part.
            parts = jax.tree.map(lambda part, split: _vary(part, used - _mesh_axes(split)), parts, in_specs)
            whole = [
                jax.tree.map(lambda part, split, names=names: _gather(part, names, split, gather), *pair)
                for names, *pair in zip(in_names, parts, in_specs, strict=True)
            ]
            return _sum(body(*whole), out_spec, axes)

        return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_spec)(*args)

    return call


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return (part,) if isinstance(part, str) else part or ()


def _mesh_axes(s: P) -> set[str]:
    return {axis for part in s for axis in _axes(part)}


def _vary(x: jax.Array, axes: set[str]) -> jax.Array:
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def vary_like(made: Any, *args: jax.Array) -> Any:
    """`made` by a kernel or for a loop, one array or a tree, inside `per_device`: each device's own where an argument
    is, as jax cannot know.
    """
    axes = set().union(*(jax.typeof(arg).manual_axis_type.varying for arg in args))
    return jax.tree.map(lambda x: _vary(x, axes), made)


def _gather(x: jax.Array, names: tuple[str | None, ...], s: P, gather: tuple[str, ...]) -> jax.Array:
    """`x`, split as `s` says, with its dimensions that `gather` names whole."""
    for dim, name in enumerate(names):
        if name in gather and (axes := _axes(s[dim])):
            x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def _sum(x: jax.Array, s: P, axes: tuple[str, ...]) -> jax.Array:
    """`x` added up over the mesh axes `axes`; of a dimension that `s` splits over some of them, the device's part."""
    for dim, part in enumerate(s):
        if shared := tuple(axis for axis in _axes(part) if axis in axes):
            x = jax.lax.psum_scatter(x, shared, scatter_dimension=dim, tiled=True)
            axes = tuple(axis for axis in axes if axis not in shared)
    return jax.lax.psum(x, axes) if axes else x


def shards(name: str, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> int:
    """Into how many parts `mesh` splits a logical axis that all of its rule's mesh axes divide."""
    return math.prod(mesh.shape[axis] for axis in rules[name].mesh_axes)


def local_index(index: jax.Array, name: str, size: int) -> jax.Array:
    """Inside `per_device`: indices into an axis `name` of `size` as indices into this device's part of it.

    Those into other devices' parts become the size of the part, which is past its end. Outside of a mesh they are
    unchanged.
    """
    active = _active.get()
    axes = () if active is None else _axes(spec((name,), (size,), *active)[0])
    if not axes:
        return index
    part = size // math.prod(active[0].shape[axis] for axis in axes)
    local = index - jax.lax.axis_index(axes) * part
    return jax.numpy.where((local >= 0) & (local < part), local, part)
