"""Ahead-of-time (AOT) compilation for GPUs that are absent, and the memory analysis of compiled programs.

jax's CUDA plugin wheel contains the compiler. It needs neither a GPU nor the CUDA libraries, and takes a text
description of the GPU. Nothing is allocated: arguments are ShapeDtypeStructs with shardings.
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
from sharding.xla_flags import Options
from sphinx_jax.hardware import Gpu
from sphinx_jax.memory_plan.native_stderr import drop_no_driver_messages

Compiler = Literal["gpu", "cpu-estimate"]

GPUS_PER_HOST = 8

_CUDNN_VERSION = 91000
"""9.10, as cuDNN counts."""

# Autotuning needs a GPU. Without it XLA takes the first tiling of its own Triton matmuls, which may not even compile.
# With cuBLAS matmuls the program is always the same. A program's own options take precedence.
_OPTIONS: Options = {"xla_gpu_enable_triton_gemm": False}


def has_gpu_compiler() -> bool:
    """Whether jax's CUDA plugin is installed, for CUDA 12 or 13."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def planning_mesh(gpu: Gpu, shape: MeshShape) -> tuple[Mesh, Compiler]:
    """A mesh of `shape` over devices that do not exist, and the compiler of its programs.

    Without the CUDA plugin the devices are simulated CPU devices. Call it before jax initialises its backends.
    """
    if not has_gpu_compiler():
        num_devices: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]  # dynamic
        simulate_devices(max(shape.size, num_devices))
        return make_mesh(**dataclasses.asdict(shape)), "cpu-estimate"
    # Otherwise the plugin checks for a GPU and for the CUDA libraries; only its compiler is used here.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    per_host = math.gcd(shape.size, GPUS_PER_HOST)
    _assume_cudnn()
    with drop_no_driver_messages():
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=gpu.target_description(),
            topology=f"{shape.size // per_host}x{per_host}x1",
        )
    return make_mesh(**dataclasses.asdict(shape), devices=topology.devices), "gpu"


def _assume_cudnn() -> None:
    """Answer jax's check for the cuDNN library where it is not installed: jax[cuda12] brings it to the GPU.

    The compiler takes cuDNN's attention as one call. It needs the version only, that of `Gpu.target_description`.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused_attention

    try:
        fused_attention.check_cudnn_version()
    except RuntimeError:
        fused_attention.check_cudnn_version = lambda: _CUDNN_VERSION


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs. `results` excludes outputs that alias donated arguments."""

    arguments: int
    results: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporaries


def compile_aot(program: Program, args: tuple, mesh: Mesh) -> jax.stages.Compiled:
    """`program` compiled for the devices of `mesh`, real or absent; `args` are arrays or ShapeDtypeStructs."""
    if mesh.devices.flat[0].platform == "cpu":
        return program.compile(args, mesh)
    return program.compile(args, mesh, "cuda", _OPTIONS)


def memory_analysis(compiled: jax.stages.Compiled) -> Memory:
    """The compiler's buffer assignment, in bytes on each device. Raises RuntimeError if the backend has none."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise RuntimeError("the compiler reports no memory analysis")
    return Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )


def hlo_text(compiled: jax.stages.Compiled) -> str:
    """The optimised HLO of a compiled program. Raises RuntimeError if the backend has none."""
    text = compiled.as_text()
    if text is None:
        raise RuntimeError("the compiler reports no HLO text")
    return text
