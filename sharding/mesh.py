"""Device meshes of four axes: data, fsdp, expert, tensor; and simulated devices."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.errors import LayoutError

AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """The number of devices along each mesh axis; the mesh has their product."""

    data: int = 1
    """Data parallelism: replicas of all parameters, each with its own shard of the batch."""
    fsdp: int = 1
    """Fully sharded data parallelism (ZeRO-3): the batch, parameters and optimizer state are sharded; parameters are
    all-gathered for use."""
    expert: int = 1
    """Expert parallelism: experts, and attention heads beyond `tensor`, are sharded."""
    tensor: int = 1
    """Tensor parallelism: attention heads and the experts' hidden dimension are sharded."""

    @property
    def size(self) -> int:
        return math.prod(dataclasses.astuple(self))


def simulate_devices(count: int) -> None:
    """Make this process see `count` CPU devices. Call it before the first use of jax's devices.

    Raises LayoutError if jax has already started with another number of devices.
    """
    # A simulated device blocks one thread in every collective that it waits for, and independent collectives run
    # concurrently: with XLA's default of one thread per device they deadlock until XLA aborts the process.
    os.environ.setdefault("NPROC", str(8 * count))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # jax has already started; the check below decides whether that matters
    if jax.local_device_count() != count:
        raise LayoutError(
            f"cannot simulate {count} devices: jax has already started with {jax.local_device_count()}; "
            "simulate before the first use of jax"
        )


def make_mesh(
    data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of exactly data x fsdp x expert x tensor devices, in that order: `tensor` varies fastest.

    Uses the first of `jax.devices()` unless `devices` are given. Raises LayoutError if there are too few.
    """
    shape = MeshShape(data, fsdp, expert, tensor)
    for axis in AXES:
        if getattr(shape, axis) < 1:
            raise LayoutError(f"mesh axis {axis!r} must be 1 or more, got {getattr(shape, axis)}")
    available = list(jax.devices() if devices is None else devices)
    if len(available) < shape.size:
        requested = " x ".join(f"{axis} {getattr(shape, axis)}" for axis in AXES)
        raise LayoutError(
            f"the mesh {requested} needs {shape.size} devices and there are {len(available)}; "
            f"use a smaller mesh, or --simulate-devices {shape.size} to try it on one CPU"
        )
    grid = np.array(available[: shape.size]).reshape(dataclasses.astuple(shape))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def default_mesh_shape(devices: int, kv_heads: int, experts: int) -> MeshShape:
    """All devices on `tensor` as far as they divide the key/value heads, then on `expert`, then on `data`.

    Tensor parallelism is balanced whatever the router does and needs no all-to-all of tokens.
    """
    tensor = math.gcd(devices, kv_heads)
    expert = math.gcd(devices // tensor, experts)
    return MeshShape(data=devices // (tensor * expert), expert=expert, tensor=tensor)
