"""Device meshes of four axes: data, fsdp, expert, tensor; and simulated devices."""

import dataclasses
import math
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding.errors import LayoutError

AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices lie along each axis of the mesh; their product is the number of devices."""

    data: int = 1
    """Replicas: each has all the parameters and its own part of the batch."""
    fsdp: int = 1
    """Parts of the batch whose parameters and optimizer state are shared out, and gathered for use."""
    expert: int = 1
    """Devices that the experts, and the attention heads, are split over."""
    tensor: int = 1
    """Devices that each expert's hidden dimension, and the attention heads, are split over."""

    @property
    def size(self) -> int:
        return math.prod(dataclasses.astuple(self))


def simulate_devices(count: int) -> None:
    """Make this process see `count` CPU devices. Call it before anything asks jax for its devices.

    Raises LayoutError if jax has started already with another count.
    """
    # A simulated device holds a thread in every collective it waits in, and independent ones run at once:
    # with XLA's one thread a device they wait for one another until it aborts the process.
    os.environ.setdefault("NPROC", str(8 * count))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # jax has started; whether that matters is decided by what it sees
    if jax.local_device_count() != count:
        raise LayoutError(
            f"cannot simulate {count} devices: jax has already started with {jax.local_device_count()}; "
            "simulate before the first use of jax"
        )


def make_mesh(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of exactly data x fsdp x expert x tensor devices, `tensor` neighbours closest together.

    Uses the first devices that jax sees unless `devices` are given. Raises LayoutError if there are too few.
    """
    shape = MeshShape(data, fsdp, expert, tensor)
    for axis in AXES:
        if getattr(shape, axis) < 1:
            raise LayoutError(f"mesh axis {axis!r} must be 1 or more, got {getattr(shape, axis)}")
    available = list(jax.devices() if devices is None else devices)
    if len(available) < shape.size:
        wanted = " x ".join(f"{axis} {getattr(shape, axis)}" for axis in AXES)
        raise LayoutError(
            f"the mesh {wanted} needs {shape.size} devices and there are {len(available)}; "
            f"use a smaller mesh, or --simulate-devices {shape.size} to try it on one CPU"
        )
    grid = np.array(available[: shape.size]).reshape(dataclasses.astuple(shape))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def default_mesh_shape(devices: int, kv_heads: int, experts: int) -> MeshShape:
    """Everything on `tensor` as far as the key/value heads divide, then `expert`, then `data`.

    Splitting the hidden dimension is balanced whatever the router does and needs no exchange of tokens.
    """
    tensor = math.gcd(devices, kv_heads)
    expert = math.gcd(devices // tensor, experts)
    return MeshShape(data=devices // (tensor * expert), expert=expert, tensor=tensor)
