"""Print the table of docs/multi-host.md: a training step of SPHINX-MoE on many GPUs, with what crosses the network.

python docs/make_scale.py 16 32 128 1024        a minute or two a row on two cores
"""

import sys

from sharding import MeshShape
from sphinx_jax.config import preset
from sphinx_jax.hardware import GIB, find_gpu
from sphinx_jax.memory_plan.aot import has_gpu_compiler
from sphinx_jax.memory_plan.report import Plan, mesh_text
from sphinx_jax.memory_plan.training import training_batch, training_plan
from sphinx_jax.training.train_config import TrainConfig

GPU, PRESET, MAX_LENGTH = "h100-80gb", "sphinx-moe", 2048

MESHES = {
    16: (MeshShape(tensor=8, fsdp=2), MeshShape(tensor=8, expert=2)),
    32: (MeshShape(tensor=8, fsdp=4), MeshShape(tensor=4, fsdp=8), MeshShape(tensor=8, expert=4)),
    128: (MeshShape(tensor=8, fsdp=16), MeshShape(tensor=8, expert=4, fsdp=4)),
    1024: (MeshShape(tensor=8, fsdp=128), MeshShape(tensor=8, fsdp=32, data=4)),
}
"""Number of GPUs -> meshes."""

COLUMNS = (
    "GPUs",
    "mesh",
    "batch",
    "GiB per GPU",
    "compute, s",
    "NVLink, s",
    "GiB out of a host, by axes",
    "network, s",
)


def plan(mesh: MeshShape) -> Plan:
    """One optimizer step of --stage mm_stage2, half a sequence a GPU, every layer rematerialised."""
    config = preset(PRESET)
    train_config = TrainConfig(batch_size=mesh.size // 2, stage="mm_stage2", dtype="bfloat16", remat="block")
    shapes = training_batch(config, train_config, MAX_LENGTH)
    return training_plan(PRESET, config, find_gpu(GPU), mesh, train_config, shapes)


def row(mesh: MeshShape) -> str:
    """A line of the table."""
    planned = plan(mesh)
    crossing = [found for found in planned.communication if found.cross_host_bytes]
    inside = sum(found.seconds for found in planned.communication if not found.cross_host_bytes)
    cells = (
        f"{mesh.size:,}",
        mesh_text(planned.mesh),
        f"{mesh.size // 2}",
        f"{planned.per_device['total_bytes'] / GIB:.1f}",
        f"{planned.roofline['step_seconds_at_least']:.2f}",
        f"{inside:.2f}",
        ", ".join(f"{' × '.join(found.axes)} {found.cross_host_bytes / GIB:.1f}" for found in crossing),
        f"{sum(found.seconds for found in crossing):.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    if not has_gpu_compiler():
        sys.exit("error: needs jax's CUDA plugin to compile for absent GPUs: pip install -e '.[plan]'")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for number in map(int, sys.argv[1:]):
        for mesh in MESHES[number]:
            print(row(mesh), flush=True)


if __name__ == "__main__":
    main()
