"""A function with its compilation settings: donated arguments, output shardings, axis rules, compiler options."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sharding.axis_rules import DEFAULT_RULES, Rules
from sharding.context import mesh_context
from sharding.xla_flags import Options, compiler_options


class Program(NamedTuple):
    """`donate`: indices of donated arguments. `out_shardings`: None leaves them to XLA.

    `slices_in_place`: compile with `xla_flags.SLICES_IN_PLACE`, so that products with stacked matrices read them in
    place if the compiler can. `overlap_collectives`: compile with `xla_flags.OVERLAP_COLLECTIVES`, so that several GPUs
    compute while they communicate. `fused_operands`: compile with `xla_flags.FUSED_OPERANDS`, so that products compute
    their operands, such as dequantized weights, from what these are computed from.
    """

    function: Callable
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    rules: Rules = DEFAULT_RULES
    slices_in_place: bool = False
    overlap_collectives: bool = False
    fused_operands: bool = False

    def trace(self, args: tuple, mesh: Mesh) -> jax.stages.Traced:
        """Trace the function for `args`, arrays or ShapeDtypeStructs, with shardings on `mesh`."""
        with mesh_context(mesh, self.rules, self.slices_in_place, self.fused_operands):
            jitted = jax.jit(self.function, donate_argnums=self.donate, out_shardings=self.out_shardings)
            return jitted.trace(*args)

    def compile(self, args: tuple, mesh: Mesh) -> jax.stages.Compiled:
        """Compile the function for `args` and the devices of `mesh`."""
        return self.trace(args, mesh).lower().compile(compiler_options=self.options(mesh))

    def options(self, mesh: Mesh) -> Options:
        """The compiler options on `mesh`."""
        return compiler_options(mesh, self.slices_in_place, self.overlap_collectives, self.fused_operands)
