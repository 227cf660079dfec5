"""Compiling for a GPU that is not there."""

import math
import os

import jax
import pytest
from jax.experimental import topologies

import sharding

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="session")
def gpu_mesh():
    """Makes a mesh of H100s that exist by description only: programs can be compiled for it, not run."""

    def make(**shape):
        count = math.prod(shape.values())
        try:
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=H100, topology=f"1x{count}x1"
            )
        except Exception as error:
            pytest.skip(f"needs jax-cuda12-pjrt and jax-cuda12-plugin, to compile for a GPU without one: {error}")
        return sharding.make_mesh(**shape, devices=topology.devices)

    return make


@pytest.fixture(scope="session")
def compile_for_gpu():
    """Compiles a function of abstract arguments that lie on such a mesh."""

    def compiled(mesh, function, *args):
        with sharding.use(mesh):
            return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()

    return compiled
