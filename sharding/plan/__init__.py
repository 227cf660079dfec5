"""What fits where: programs compiled ahead of time for GPUs that are not there, and what is read off them."""

from sharding.plan.compile import Compiler, Memory, compile_ahead, has_gpu_compiler, memory_of, planning_mesh
from sharding.plan.gpus import GPUS, Gpu, find_gpu, gpu_of_device
from sharding.plan.program import Collective, collectives, largest_values
from sharding.plan.report import Plan, ProgramPlan, mesh_text, print_json, print_plan, print_sweep
from sharding.plan.traffic import Traffic, traffic

__all__ = [
    "GPUS",
    "Collective",
    "Compiler",
    "Gpu",
    "Memory",
    "Plan",
    "ProgramPlan",
    "Traffic",
    "collectives",
    "compile_ahead",
    "find_gpu",
    "gpu_of_device",
    "has_gpu_compiler",
    "largest_values",
    "memory_of",
    "mesh_text",
    "planning_mesh",
    "print_json",
    "print_plan",
    "print_sweep",
    "traffic",
]
