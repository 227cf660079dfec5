"""Loops that XLA:CPU compiles to one kernel."""

from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def single_cpu_kernel(function: Callable) -> Callable:
    """`function` compiled by XLA:CPU to one kernel, loops included: otherwise each loop step costs a kernel launch.

    XLA sets this attribute on small loops itself; a compiler that does not know it ignores it. The gradient is compiled
    without it: not all of its operations may be part of such a kernel, and it is no faster as one.
    """
    attributes = ("xla_cpu_small_call", "true"), ("inlineable", "false")

    @jax.jit
    def unmarked(*args):
        with set_xla_metadata(**{name: None for name, _ in attributes}):
            return function(*args)

    @jax.custom_vjp
    def marked(*args):
        with set_xla_metadata(**dict(attributes)):
            return unmarked(*args)

    marked.defvjp(lambda *args: jax.vjp(function, *args), lambda vjp, dy: vjp(dy))
    return marked
