"""`jax.shard_map` over logical axis names: per-device code on local shards, with the collectives around it."""

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
    """`body` on each device's local shards; its results are summed over the mesh axes that shard `sum_over`.

    `in_names` and `out_names` are the logical axes of each argument and of the result. Parameters that are stored
    sharded further (by fsdp) are all-gathered on entry. An argument may be a tree of arrays with the same logical
    axes; dimensions of size one are not sharded. Dimensions named in `gather` are all-gathered for `body`. The sum is
    an all-reduce, or a reduce-scatter along an output dimension that the summed axes shard. Without a mesh the result
    is `body` itself.
    """
    active = active_mesh()
    if active is None or active[0].size == 1:
        return body
    mesh, rules = active
    sum_axes = tuple(axis for name in sum_over for axis in rules[name].mesh_axes if mesh.shape[axis] > 1)

    def specs_of(names: tuple[str | None, ...], arg: Any) -> Any:
        """The PartitionSpec of each array of one argument."""

        def spec(array: jax.Array) -> P:
            sharded = tuple(name if size > 1 else None for name, size in zip(names, array.shape, strict=True))
            return partition_spec(sharded, array.shape, mesh, rules)

        return jax.tree.map(spec, arg)

    def call(*args: Any) -> jax.Array:
        in_specs = tuple(specs_of(n, a) for n, a in zip(in_names, args, strict=True))
        # The result has the first argument's batch and length, which decide whether its axes divide.
        out_spec = partition_spec(out_names, args[0].shape, mesh, rules)
        used = set().union(*(_mesh_axes(s) for s in jax.tree.leaves(in_specs)))

        def per_device(*shards: Any) -> jax.Array:
            # Replicated arguments become device-varying here, once: the transpose of this cast is the one all-reduce
            # of their gradients.
            shards = jax.tree.map(lambda shard, spec: _vary(shard, used - _mesh_axes(spec)), shards, in_specs)
            gathered = [
                jax.tree.map(lambda shard, spec, names=names: _gather(shard, names, spec, gather), *pair)
                for names, *pair in zip(in_names, shards, in_specs, strict=True)
            ]
            return _sum(body(*gathered), out_spec, sum_axes)

        return jax.shard_map(per_device, mesh=mesh, in_specs=in_specs, out_specs=out_spec)(*args)

    return call


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _mesh_axes(spec: P) -> set[str]:
    """The mesh axes of all dimensions of a PartitionSpec."""
    return {axis for entry in spec for axis in _axes(entry)}


def _vary(x: jax.Array, axes: set[str]) -> jax.Array:
    """`x` marked as device-varying over `axes`."""
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def pvary_like(tree: Any, *args: jax.Array) -> Any:
    """Inside `sharded_map`: an array or tree marked as device-varying over the mesh axes that `args` vary over.

    Results of kernels and initial values of loops need it: jax cannot infer it for them.
    """
    axes = set().union(*(jax.typeof(arg).manual_axis_type.varying for arg in args))
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def _gather(x: jax.Array, names: tuple[str | None, ...], spec: P, gather: tuple[str, ...]) -> jax.Array:
    """The shard `x` of an array sharded as `spec`, with the dimensions named in `gather` all-gathered."""
    for dim, name in enumerate(names):
        if name in gather and (axes := _axes(spec[dim])):
            x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def _sum(x: jax.Array, out_spec: P, axes: tuple[str, ...]) -> jax.Array:
    """The sum of `x` over the mesh axes `axes`: reduce-scatter where `out_spec` has them, all-reduce elsewhere."""
    for dim, entry in enumerate(out_spec):
        if scattered := tuple(axis for axis in _axes(entry) if axis in axes):
            x = jax.lax.psum_scatter(x, scattered, scatter_dimension=dim, tiled=True)
            axes = tuple(axis for axis in axes if axis not in scattered)
    return jax.lax.psum(x, axes) if axes else x


def local_index(index: jax.Array, name: str, size: int) -> jax.Array:
    """Inside `sharded_map`: global indices into an axis `name` of `size`, as indices into this device's shard.

    Indices into other devices' shards become the shard's size, one past its end. Without a mesh they are unchanged.
    """
    active = active_mesh()
    if active is None:
        return index
    mesh, rules = active
    axes = _axes(partition_spec((name,), (size,), mesh, rules)[0])
    if not axes:
        return index
    shard_size = size // math.prod(mesh.shape[axis] for axis in axes)
    local = index - jax.lax.axis_index(axes) * shard_size
    return jax.numpy.where((local >= 0) & (local < shard_size), local, shard_size)
