"""Ahead-of-time compilation for GPUs that this machine does not have."""

import jax
import pytest

import sharding
from sharding import MeshShape
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import has_gpu_compiler, planning_mesh


@pytest.fixture(scope="session")
def gpu_mesh():
    """Make a mesh of GPUs known by description only: programs are compiled for it, not run."""

    def make(gpu="a100-80gb", **shape):
        if not has_gpu_compiler():
            pytest.skip("needs jax's CUDA plugin to compile without a GPU: pip install -e '.[plan]'")
        return planning_mesh(find_gpu(gpu), MeshShape(**shape))[0]

    return make


@pytest.fixture(scope="session")
def compile_for_gpu():
    """Compile a function for abstract arguments on such a mesh."""

    def compiled(mesh, function, *args):
        with sharding.mesh_context(mesh):
            return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()

    return compiled
