"""The mesh and the table that code is traced for, and what depends on them: platform, GPU, layout constraints."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from sharding import xla_flags
from sharding.axis_rules import DEFAULT_RULES, Rules, named_sharding

_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("layout", default=None)
_in_place: contextvars.ContextVar[bool] = contextvars.ContextVar("slices in place", default=False)


@contextlib.contextmanager
def mesh_context(mesh: Mesh, rules: Rules = DEFAULT_RULES, slices_in_place: bool = False) -> Iterator[None]:
    """Within this context, `constrain` and `sharded_map` lay arrays out on `mesh`. Outside, they do nothing.

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
    """Whether products read a fixed slice of a stack of matrices in place (`xla_flags.reads_slices_in_place`)."""
    return _in_place.get() and xla_flags.reads_slices_in_place(_device())


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
    return jax.lax.with_sharding_constraint(x, named_sharding(names, x.shape, mesh, rules))


def active_mesh() -> tuple[Mesh, Rules] | None:
    """The mesh in use and its table, or None outside of a mesh."""
    return _active.get()
