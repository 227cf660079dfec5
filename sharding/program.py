"""A function together with how it is compiled: what it takes over, and where its results lie."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sharding.rules import DEFAULT_RULES, Rules, use
from sharding.xla_options import compiler_options


class Program(NamedTuple):
    """`donate` numbers the arguments whose memory the results may take; `out_shardings` None leaves it to XLA."""

    function: Callable
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    rules: Rules = DEFAULT_RULES

    def trace(self, args: tuple, mesh: Mesh) -> jax.stages.Traced:
        """Traced for `args`, arrays or ShapeDtypeStructs, with the layout of `mesh`."""
        with use(mesh, self.rules):
            jitted = jax.jit(self.function, donate_argnums=self.donate, out_shardings=self.out_shardings)
            return jitted.trace(*args)

    def compile(self, args: tuple, mesh: Mesh) -> jax.stages.Compiled:
        """Compiled for the devices of `mesh`."""
        return self.trace(args, mesh).lower().compile(compiler_options=compiler_options(mesh))
