"""A function with its compilation settings: donated arguments, output shardings, axis rules, compiler options."""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sharding.axis_rules import DEFAULT_RULES, Rules
from sharding.context import mesh_context
from sharding.xla_flags import FUSED_GROUPS, Options, compiler_options

log = logging.getLogger(__name__)


class Program(NamedTuple):
    """`donate`: indices of donated arguments. `out_shardings`: None leaves them to XLA.

    `slices_in_place`: compile with `xla_flags.SLICES_IN_PLACE`, so that products with stacked matrices read them in
    place if the compiler can. `overlap_collectives`: compile with `xla_flags.OVERLAP_COLLECTIVES`, so that several GPUs
    compute while they communicate. `fused_operands`: compile with `xla_flags.FUSED_OPERANDS`, so that products compute
    their operands, such as dequantized weights, from what these are computed from; with `fused_groups` and
    `xla_flags.FUSED_GROUPS` also from numbers of groups along the contracted dimension.
    """

    function: Callable
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    rules: Rules = DEFAULT_RULES
    slices_in_place: bool = False
    overlap_collectives: bool = False
    fused_operands: bool = False
    fused_groups: bool = True

    def trace(self, args: tuple, mesh: Mesh) -> jax.stages.Traced:
        """Trace the function for `args`, arrays or ShapeDtypeStructs, with shardings on `mesh`."""
        fused = self.fused_operands, self.fused_operands and self.fused_groups
        with mesh_context(mesh, self.rules, self.slices_in_place, *fused):
            jitted = jax.jit(self.function, donate_argnums=self.donate, out_shardings=self.out_shardings)
            return jitted.trace(*args)

    def compile(
        self, args: tuple, mesh: Mesh, platform: str | None = None, default_options: Options | None = None
    ) -> jax.stages.Compiled:
        """Compile the function for `args` and the devices of `mesh`; `platform` is that of absent devices.

        The options of the program take precedence over `default_options`. If the compiler fails with FUSED_GROUPS,
        whose options are experimental, the program is compiled without them.
        """
        platforms = None if platform is None else (platform,)
        options = self.options(mesh)
        try:
            lowered = self.trace(args, mesh).lower(lowering_platforms=platforms)
            return lowered.compile(compiler_options=(default_options or {}) | options)
        except jax.errors.JaxRuntimeError as error:
            if not options.keys() & FUSED_GROUPS.keys():
                raise
            log.warning("a program is compiled with slower products of quantized weights, as XLA fails: %s", error)
            # A function of its own: jax keeps the trace of this one, made with `sharding.fuses_groups()`.
            again = self._replace(function=functools.partial(self.function), fused_groups=False)
            return again.compile(args, mesh, platform, default_options)

    def options(self, mesh: Mesh) -> Options:
        """The compiler options on `mesh`."""
        fused = self.fused_operands, self.fused_operands and self.fused_groups
        return compiler_options(mesh, self.slices_in_place, self.overlap_collectives, *fused)
