"""Meshes, the table from logical axes to mesh axes, and making arrays where they live.

Knows nothing of any model: names of axes in, places on devices out.
"""

import sharding.start  # noqa: F401  before anything else imports jax

# isort: split
from sharding.init import abstract_params, bytes_per_device, init_params, shardings_of
from sharding.mesh import AXES, MeshShape, default_mesh_shape, make_mesh, simulate_devices
from sharding.processes import NO_PROCESSES, Processes, check_processes, each_from_first, from_first, start_processes
from sharding.program import Program
from sharding.rules import (
    DEFAULT_RULES,
    SEQUENCE_PARALLEL_RULES,
    LayoutError,
    Rule,
    Rules,
    compute_capability,
    constrain,
    device_count,
    local_index,
    multiprocessors,
    per_device,
    place,
    platform,
    reads_slices_in_place,
    shards,
    spec,
    use,
    vary_like,
)
from sharding.xla_options import compiler_options

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "NO_PROCESSES",
    "SEQUENCE_PARALLEL_RULES",
    "LayoutError",
    "MeshShape",
    "Processes",
    "Program",
    "Rule",
    "Rules",
    "abstract_params",
    "bytes_per_device",
    "check_processes",
    "compiler_options",
    "compute_capability",
    "constrain",
    "default_mesh_shape",
    "device_count",
    "each_from_first",
    "from_first",
    "init_params",
    "local_index",
    "make_mesh",
    "multiprocessors",
    "per_device",
    "place",
    "platform",
    "reads_slices_in_place",
    "shardings_of",
    "shards",
    "simulate_devices",
    "spec",
    "start_processes",
    "use",
    "vary_like",
]
