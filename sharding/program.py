"""A function together with how it is compiled: what it takes over, and where its results lie."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sharding.axis_rules import DEFAULT_RULES, Rules
from sharding.context import mesh_context
from sharding.xla_flags import Options, compiler_options


class Program(NamedTuple):
    """`donate` numbers the arguments whose memory the results may take; `out_shardings` None leaves it to XLA.

    `slices_in_place` is for programs whose time goes into products with matrices of a stack: they are read where they
    lie, if the compiler can (`xla_flags.SLICES_IN_PLACE`).
    """

    function: Callable
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    rules: Rules = DEFAULT_RULES
    slices_in_place: bool = False

    def trace(self, args: tuple, mesh: Mesh) -> jax.stages.Traced:
        """Traced for `args`, arrays or ShapeDtypeStructs, with the layout of `mesh`."""
        with mesh_context(mesh, self.rules, self.slices_in_place):
            jitted = jax.jit(self.function, donate_argnums=self.donate, out_shardings=self.out_shardings)
            return jitted.trace(*args)

    def compile(self, args: tuple, mesh: Mesh) -> jax.stages.Compiled:
        """Compiled for the devices of `mesh`."""
        return self.trace(args, mesh).lower().compile(compiler_options=self.options(mesh))

    def options(self, mesh: Mesh) -> Options:
        """What it is compiled with."""
        return compiler_options(mesh, self.slices_in_place)
