"""Compile the programs of a plan in parallel."""

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from jax.sharding import Mesh

from sharding import Program, bytes_per_device
from sphinx_jax.memory_plan.aot import compile_aot, hlo_text, memory_analysis
from sphinx_jax.memory_plan.cudnn_workspace import cudnn_workspace_bytes
from sphinx_jax.memory_plan.hlo import collectives
from sphinx_jax.memory_plan.report import ProgramPlan


class Job(NamedTuple):
    """A program and its abstract arguments.

    `persistent` are the indices of the arguments that stay in device memory between calls: parameters and state.
    """

    name: str
    program: Program
    args: tuple
    persistent: tuple[int, ...] = ()

    def transient_bytes(self) -> int:
        """Bytes on each device of the arguments that exist only during a call."""
        return sum(bytes_per_device(arg) for i, arg in enumerate(self.args) if i not in self.persistent)


def compile_jobs(jobs: Sequence[Job], mesh: Mesh) -> tuple[ProgramPlan, ...]:
    """Each program compiled for `mesh`, two at a time: the compiler is mostly single-threaded."""

    def compile_job(job: Job) -> ProgramPlan:
        start = time.perf_counter()
        compiled = compile_aot(job.program, job.args, mesh)
        text, memory = hlo_text(compiled), memory_analysis(compiled)
        # Added to the program's peak, wherever that is: an upper bound.
        memory = dataclasses.replace(memory, temporaries=memory.temporaries + cudnn_workspace_bytes(text))
        return ProgramPlan(job.name, memory, tuple(collectives(text, mesh)), time.perf_counter() - start)

    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(compile_job, jobs))
