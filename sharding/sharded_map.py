"""`jax.shard_map` over the names of axes: code that each device runs on its own part of the arrays."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from sharding.axis_rules import partition_spec
from sharding.context import active_mesh


def sharded_map(
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
    active = active_mesh()
    if active is None or active[0].size == 1:
        return body
    mesh, rules = active
    axes = tuple(axis for name in sum_over for axis in rules[name].mesh_axes if mesh.shape[axis] > 1)

    def split_like(names: tuple[str | None, ...], arg: Any) -> Any:
        more_than_one = lambda array: tuple(n if size > 1 else None for n, size in zip(names, array.shape, strict=True))
        return jax.tree.map(lambda array: partition_spec(more_than_one(array), array.shape, mesh, rules), arg)

    def call(*args: Any) -> jax.Array:
        in_specs = tuple(split_like(n, a) for n, a in zip(in_names, args, strict=True))
        # The result's batch is split like the first argument's.
        out_spec = partition_spec(out_names, args[0].shape, mesh, rules)
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


def pvary_like(made: Any, *args: jax.Array) -> Any:
    """`made` by a kernel or for a loop, one array or a tree, inside `sharded_map`: each device's own where an argument
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


def local_index(index: jax.Array, name: str, size: int) -> jax.Array:
    """Inside `sharded_map`: indices into an axis `name` of `size` as indices into this device's part of it.

    Those into other devices' parts become the size of the part, which is past its end. Outside of a mesh they are
    unchanged.
    """
    active = active_mesh()
    axes = () if active is None else _axes(partition_spec((name,), (size,), *active)[0])
    if not axes:
        return index
    part = size // math.prod(active[0].shape[axis] for axis in axes)
    local = index - jax.lax.axis_index(axes) * part
    return jax.numpy.where((local >= 0) & (local < part), local, part)
