"""A plan: what one device holds and does, whether it fits its card, and how that is printed."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sphinx_jax.hardware import GIB, Gpu
from sphinx_jax.memory_plan.aot import Compiler, Memory
from sphinx_jax.memory_plan.hlo import Collective

CONTEXT_BYTES = 1 * GIB
"""Set aside on every card: the CUDA context, loaded kernels, cuBLAS and cuDNN workspaces."""

COMMUNICATION_BYTES = GIB // 2
"""Set aside where there are several cards: NCCL's buffers."""


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One compiled program. `collectives` are those of one run; of one round, where it loops until it is done."""

    name: str
    memory: Memory
    collectives: tuple[Collective, ...]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes are bytes of the busiest device. `share` is of what all devices hold and do together."""

    job: str
    gpu: Gpu
    mesh: Mapping[str, int]
    compiler: Compiler
    parameters: Mapping[str, int]
    optimizer: int
    gradients: int
    kv_cache: int
    inputs: int
    temporaries: int
    share: Mapping[str, float]
    roofline: Mapping[str, float]
    programs: tuple[ProgramPlan, ...]
    main_program: str
    """The one whose collectives are reported."""
    speed: float
    """Tokens a second at most, to compare plans by."""
    command: str
    """What runs it."""
    notes: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        count = 1
        for size in self.mesh.values():
            count *= size
        return count

    @property
    def reserve(self) -> int:
        return CONTEXT_BYTES + (COMMUNICATION_BYTES if self.num_gpus > 1 else 0)

    @property
    def sharded_map(self) -> dict[str, int]:
        parts = {
            "parameters_bytes": sum(self.parameters.values()),
            "optimizer_bytes": self.optimizer,
            "gradients_bytes": self.gradients,
            "kv_cache_bytes": self.kv_cache,
            "inputs_bytes": self.inputs,
            "temporaries_bytes": self.temporaries,
            "reserve_bytes": self.reserve,
        }
        return parts | {"total_bytes": sum(parts.values()), "capacity_bytes": self.gpu.memory_bytes}

    @property
    def headroom(self) -> int:
        """Bytes left over; negative where it does not fit."""
        return self.gpu.memory_bytes - self.sharded_map["total_bytes"]

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return next(program.collectives for program in self.programs if program.name == self.main_program)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "fits": self.fits,
            "job": self.job,
            "compiler": self.compiler,
            "gpu": self.gpu.name,
            "num_gpus": self.num_gpus,
            "mesh": dict(self.mesh),
            "per_device": self.sharded_map,
            "parameters": dict(self.parameters),
            "share": dict(self.share),
            "collectives": [dataclasses.asdict(collective) for collective in self.collectives],
            "roofline": dict(self.roofline),
            "programs": [
                {
                    "name": program.name,
                    "temporaries_bytes": program.memory.temporaries + program.memory.results,
                    "compile_seconds": round(program.compile_seconds, 1),
                }
                for program in self.programs
            ],
            "command": self.command,
            "notes": list(self.notes),
        }


def print_json(plans: Sequence[Plan], sweep: bool) -> None:
    """One object: the plan, or with `sweep` the best one and all of them, best first."""
    shown = {"best": plans[0].to_dict(), "plans": [plan.to_dict() for plan in plans]} if sweep else plans[0].to_dict()
    print(json.dumps(shown, indent=2))


def print_plan(plan: Plan, console: Console) -> None:
    """The table of one plan, for a person."""
    console.print(f"{plan.job}, on {plan.num_gpus} × {plan.gpu.name}: {mesh_text(plan.mesh)}", style="bold")
    if plan.compiler == "cpu-estimate":
        console.print(
            "jax's CUDA compiler is not installed (pip install -e '.[plan]'): compiled for the CPU instead. Arguments "
            "are exact; temporaries are an estimate, far too high for bfloat16.",
            style="yellow",
        )
    table = Table(box=None, pad_edge=False)
    table.add_column("on each device")
    table.add_column("GiB", justify="right")
    table.add_column("", style="dim")
    for name, size, remark in _memory_rows(plan):
        table.add_row(name, f"{size / GIB:.2f}", remark)
    console.print(table)
    verdict = (
        f"fits, with {plan.headroom / GIB:.2f} GiB to spare"
        if plan.fits
        else f"does not fit: {-plan.headroom / GIB:.2f} GiB too much on each device"
    )
    console.print(verdict, style="bold green" if plan.fits else "bold red")
    shares = ", ".join(
        f"{share * plan.num_gpus:.3f}/{plan.num_gpus} of the {name}" for name, share in plan.share.items()
    )
    console.print(f"One device holds and does {shares}.")
    if plan.collectives:
        _print_collectives(plan, console)
    for name, value in plan.roofline.items():
        console.print(f"{name.replace('_', ' ')}: {_rounded(value)}")
    for note in plan.notes:
        console.print(note, style="dim")


def _memory_rows(plan: Plan) -> list[tuple[str, int, str]]:
    size = plan.sharded_map
    max_num_seqs = [(f"parameters, {part}", held, "") for part, held in plan.parameters.items()]
    largest = max(plan.programs, key=lambda program: program.memory.temporaries + program.memory.results)
    max_num_seqs += [
        ("optimizer state", plan.optimizer, ""),
        ("gradients", plan.gradients, ""),
        ("key/value cache", plan.kv_cache, ""),
        ("inputs", plan.inputs, "everything else that programs are given"),
        ("temporaries", plan.temporaries, f"largest in: {largest.name}"),
        ("reserve", plan.reserve, "CUDA context, cuBLAS and cuDNN workspaces, NCCL: set aside, not compiled"),
    ]
    shown = [row for row in max_num_seqs if row[1]]
    return [*shown, ("total", size["total_bytes"], ""), (f"memory of {plan.gpu.name}", size["capacity_bytes"], "")]


def _print_collectives(plan: Plan, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"exchanged in: {plan.main_program}")
    table.add_column("along")
    table.add_column("times", justify="right")
    table.add_column("MiB a device", justify="right")
    for collective in plan.collectives:
        table.add_row(
            collective.kind, " × ".join(collective.axes), str(collective.count), f"{collective.bytes / 2**20:,.2f}"
        )
    console.print(table)


def print_sweep(plans: Sequence[Plan], console: Console) -> None:
    """Plans one a line, best first, and what runs the best one that fits."""
    table = Table(box=None, pad_edge=False)
    for name in ("mesh", "other", "GiB a device", "headroom", "tokens/s at most"):
        table.add_column(name, justify="left" if name in ("mesh", "other") else "right")
    for plan in plans:
        size = f"{plan.sharded_map['total_bytes'] / GIB:.2f}"
        style = None if plan.fits else "dim"
        left = f"{plan.headroom / GIB:+.2f}"
        table.add_row(mesh_text(plan.mesh), plan.job.partition(": ")[2], size, left, _rounded(plan.speed), style=style)
    console.print(table)
    if plans[0].fits:
        console.print(f"run: {plans[0].command}", highlight=False, soft_wrap=True)
    else:
        console.print(f"none fits on {plans[0].num_gpus} × {plans[0].gpu.name}", style="bold red")


def mesh_text(mesh: Mapping[str, int]) -> str:
    """The axes of more than one device."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
