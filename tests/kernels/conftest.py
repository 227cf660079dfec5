"""Compiling for a GPU that is not there."""

import jax
import pytest

import sharding
from sharding import MeshShape
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import has_gpu_compiler, planning_mesh


@pytest.fixture(scope="session")
def gpu_mesh():
    """Makes a mesh of cards that exist by description only: programs can be compiled for it, not run."""

    def make(card="a100-80gb", **shape):
        if not has_gpu_compiler():
            pytest.skip("needs jax's CUDA plugin, to compile for GPUs that are not there: pip install -e '.[plan]'")
        return planning_mesh(find_gpu(card), MeshShape(**shape))[0]

    return make


@pytest.fixture(scope="session")
def compile_for_gpu():
    """Compiles a function of abstract arguments that lie on such a mesh."""

    def compiled(mesh, function, *args):
        with sharding.mesh_context(mesh):
            return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()

    return compiled
