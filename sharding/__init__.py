"""Device meshes, the table from logical axes to mesh axes, and sharded initialisation.

The package knows nothing of any model: it turns names of axes into shardings.
"""

from sharding.axis_rules import (
    DEFAULT_RULES,
    SEQUENCE_PARALLEL_RULES,
    Rule,
    Rules,
    named_sharding,
    num_shards,
    partition_spec,
)
from sharding.context import (
    compute_capability,
    constrain,
    device_count,
    fuses_groups,
    fuses_operands,
    mesh_context,
    multiprocessors,
    platform,
    reads_slices_in_place,
)
from sharding.errors import LayoutError
from sharding.init import abstract_params, bytes_per_device, init_params, shardings_of
from sharding.mesh import AXES, MeshShape, default_mesh_shape, make_mesh, simulate_devices
from sharding.process_end import exit_now, fail, fail_with
from sharding.processes import (
    NO_PROCESSES,
    Processes,
    barrier,
    broadcast_each_from_primary,
    broadcast_from_primary,
    check_processes,
    is_primary_process,
    least_of_processes,
    start_processes,
)
from sharding.program import Program
from sharding.sharded_map import local_index, pvary_like, sharded_map
from sharding.xla_flags import compiler_options

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
    "barrier",
    "broadcast_each_from_primary",
    "broadcast_from_primary",
    "bytes_per_device",
    "check_processes",
    "compiler_options",
    "compute_capability",
    "constrain",
    "default_mesh_shape",
    "device_count",
    "exit_now",
    "fail",
    "fail_with",
    "fuses_groups",
    "fuses_operands",
    "init_params",
    "is_primary_process",
    "least_of_processes",
    "local_index",
    "make_mesh",
    "mesh_context",
    "multiprocessors",
    "named_sharding",
    "num_shards",
    "partition_spec",
    "platform",
    "pvary_like",
    "reads_slices_in_place",
    "sharded_map",
    "shardings_of",
    "simulate_devices",
    "start_processes",
]
