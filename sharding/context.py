"""The mesh and rules that code is traced for, and what depends on them: platform, GPU, sharding constraints."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from sharding import xla_flags
from sharding.axis_rules import DEFAULT_RULES, Rules, named_sharding

_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("mesh_and_rules", default=None)
_slices_in_place: contextvars.ContextVar[bool] = contextvars.ContextVar("slices_in_place", default=False)
_fused_operands: contextvars.ContextVar[bool] = contextvars.ContextVar("fused_operands", default=False)
_fused_groups: contextvars.ContextVar[bool] = contextvars.ContextVar("fused_groups", default=False)


@contextlib.contextmanager
def mesh_context(
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
    slices_in_place: bool = False,
    fused_operands: bool = False,
    fused_groups: bool = False,
) -> Iterator[None]:
    """Make `constrain` and `sharded_map` shard arrays over `mesh`. Outside of this context they do nothing.

    Trace a jitted function inside it: shardings are part of the compiled program. `slices_in_place`,
    `fused_operands` and `fused_groups` say that the program will be compiled with `xla_flags.SLICES_IN_PLACE`,
    `FUSED_OPERANDS` or `FUSED_GROUPS`.
    """
    values = {
        _active: (mesh, rules),
        _slices_in_place: slices_in_place,
        _fused_operands: fused_operands,
        _fused_groups: fused_groups,
    }
    tokens = {variable: variable.set(value) for variable, value in values.items()}
    try:
        yield
    finally:
        for variable, token in tokens.items():
            variable.reset(token)


def platform() -> str:
    """The platform of the active mesh: "cpu", "gpu" or "cuda" (a GPU known by description only).

    Without a mesh it is jax's default backend.
    """
    active = _active.get()
    return active[0].devices.flat[0].platform if active else jax.default_backend()


def compute_capability() -> str | None:
    """The compute capability of the GPU that is compiled for, such as "9.0"; None on another platform."""
    return getattr(_device(), "compute_capability", None)


def multiprocessors() -> int:
    """The number of multiprocessors of the GPU that is compiled for; 1 on another platform."""
    return getattr(_device(), "core_count", 1)


def reads_slices_in_place() -> bool:
    """Whether matrix products read a static slice of stacked matrices in place (`xla_flags.reads_slices_in_place`)."""
    return _slices_in_place.get() and xla_flags.reads_slices_in_place(_device())


def fuses_operands() -> bool:
    """Whether matrix products compute their operands from what these are computed from (`xla_flags.FUSED_OPERANDS`)."""
    return _fused_operands.get() and xla_flags.fuses_operands(_device())


def fuses_groups() -> bool:
    """Whether they do so from numbers of groups along the contracted dimension too (`xla_flags.FUSED_GROUPS`)."""
    return _fused_groups.get() and xla_flags.fuses_groups(_device())


def _device() -> jax.Device:  # pyright: ignore[reportInvalidTypeForm] (a class at run time)
    active = _active.get()
    return active[0].devices.flat[0] if active else jax.devices()[0]


def device_count() -> int:
    """The number of devices of the active mesh; 1 without a mesh."""
    active = _active.get()
    return active[0].size if active else 1


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with the sharding constraint of the logical axis `names` of its dimensions; `x` itself without a mesh."""
    active = _active.get()
    if active is None or active[0].size == 1:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, named_sharding(names, x.shape, mesh, rules))


def active_mesh() -> tuple[Mesh, Rules] | None:
    """The active mesh and its rules, or None."""
    return _active.get()
