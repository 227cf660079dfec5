"""Compiling a program for GPUs that are not there, and what such a compilation says of memory.

The CUDA compiler comes in jax's plugin wheel, needs neither a GPU nor CUDA's libraries, and takes the card's
description as text. Nothing is allocated: arguments are shapes with shardings.
"""

import dataclasses
import importlib.util
import math
import os
from typing import Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from sharding.mesh import MeshShape, make_mesh, simulate_devices
from sharding.program import Program
from sphinx_jax.hardware import Gpu
from sphinx_jax.memory_plan.native_stderr import silence_native_stderr

Compiler = Literal["gpu", "cpu-estimate"]

GPUS_PER_HOST = 8

# Without a GPU nothing can be timed, so XLA would take the first tiling of its own matrix kernels, which may not
# even compile. With the library's products the program is always the same.
_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def has_gpu_compiler() -> bool:
    """Whether jax's CUDA plugin is installed, for whichever CUDA."""
    has = lambda name: importlib.util.find_spec(name) is not None
    return has("jax_plugins") and any(has(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def planning_mesh(gpu: Gpu, shape: MeshShape) -> tuple[Mesh, Compiler]:
    """A mesh of `shape` over devices that do not exist, and which compiler its programs go through.

    Without the plugin the devices are simulated CPU devices. Call it before jax has started.
    """
    if not has_gpu_compiler():
        simulate_devices(max(shape.size, jax.config.jax_num_cpu_devices))
        return make_mesh(**dataclasses.asdict(shape)), "cpu-estimate"
    # The plugin would look for a GPU and for CUDA's libraries; only its compiler is wanted.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    per_host = math.gcd(shape.size, GPUS_PER_HOST)
    with silence_native_stderr():
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=gpu.target_description(),
            topology=f"{shape.size // per_host}x{per_host}x1",
        )
    return make_mesh(**dataclasses.asdict(shape), devices=topology.devices), "gpu"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device while a program runs: arguments, results that are not arguments, and everything between."""

    arguments: int
    results: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporaries


def compile_ahead(program: Program, args: tuple, mesh: Mesh) -> jax.stages.Compiled:
    """`program` compiled for the devices of `mesh`, real or not; `args` are arrays or ShapeDtypeStructs."""
    if mesh.devices.flat[0].platform == "cpu":
        return program.compile(args, mesh)
    options = program.options(mesh) | _OPTIONS
    return program.trace(args, mesh).lower(lowering_platforms=("cuda",)).compile(compiler_options=options)


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler says of the program's memory on each device."""
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )
