"""Compiling the programs of a plan side by side."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from jax.sharding import Mesh

from sharding import Program, bytes_per_device
from sphinx_jax.memory_plan.aot import compile_ahead, memory_of
from sphinx_jax.memory_plan.hlo import collectives
from sphinx_jax.memory_plan.report import ProgramPlan


class Job(NamedTuple):
    """A program and the abstract arguments that it is compiled for, those numbered `resident` there all the time."""

    name: str
    program: Program
    args: tuple
    resident: tuple[int, ...] = ()

    def passing_bytes(self) -> int:
        """Bytes on each device of the arguments that come and go with a call."""
        return sum(bytes_per_device(arg) for i, arg in enumerate(self.args) if i not in self.resident)


def compile_jobs(jobs: Sequence[Job], mesh: Mesh) -> tuple[ProgramPlan, ...]:
    """Each program compiled, two at a time: the compiler itself is mostly single-threaded."""

    def compiled(job: Job) -> ProgramPlan:
        start = time.perf_counter()
        made = compile_ahead(job.program, job.args, mesh)
        exchanged = tuple(collectives(made.as_text(), mesh))
        return ProgramPlan(job.name, memory_of(made), exchanged, time.perf_counter() - start)

    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(compiled, jobs))
