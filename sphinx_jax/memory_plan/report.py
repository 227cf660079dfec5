"""A plan: memory and work of one device, whether it fits the GPU, and its text and JSON reports."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sphinx_jax.hardware import GIB, Gpu
from sphinx_jax.memory_plan.aot import GPUS_PER_HOST, Compiler, Memory
from sphinx_jax.memory_plan.hlo import Collective
from sphinx_jax.memory_plan.network import NETWORK_GBIT_S, Communication, communication

RESERVE_BYTES = GIB // 2
"""Reserved in XLA's pool on every GPU: workspaces of the kernels that autotuning chooses, and gaps between arrays.

On an H200 the programs that autotuning chose took 0.14 GiB more than planned."""


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One compiled program. `collectives` are those of one run; a loop with an unknown trip count counts once."""

    name: str
    memory: Memory
    collectives: tuple[Collective, ...]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes are bytes on the device that holds most. `share` is that device's fraction of the total of all devices."""

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
    """Roofline lower bounds of time, and the upper bounds of throughput that follow."""
    programs: tuple[ProgramPlan, ...]
    main_program: str
    """The program whose collectives are reported."""
    tokens_per_second: float
    """Upper bound of throughput, by which plans are compared."""
    command: str
    """The command line of the planned run."""
    notes: tuple[str, ...] = ()
    pinned: int = 0
    """Bytes of pinned host memory for each device."""
    gpus_per_host: int = GPUS_PER_HOST
    """GPUs that NVLink or PCIe connects; between hosts is the network."""
    offload: Mapping[str, float] | None = None
    """With experts in host memory, how many the headroom keeps on the devices (`offload.with_kept_experts`)."""

    @property
    def num_gpus(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def host_pinned_bytes(self) -> int:
        """Pinned memory of a host with all GPUs of the plan, or with `gpus_per_host` of them."""
        return self.pinned * math.gcd(self.num_gpus, self.gpus_per_host)

    @property
    def per_device(self) -> dict[str, int]:
        """Bytes on one device by purpose, their total, and the capacity: what XLA can allocate on the GPU."""
        parts = {
            "parameters_bytes": sum(self.parameters.values()),
            "optimizer_bytes": self.optimizer,
            "gradients_bytes": self.gradients,
            "kv_cache_bytes": self.kv_cache,
            "inputs_bytes": self.inputs,
            "temporaries_bytes": self.temporaries,
            "reserve_bytes": RESERVE_BYTES,
        }
        return parts | {"total_bytes": sum(parts.values()), "capacity_bytes": self.gpu.pool_bytes}

    @property
    def headroom(self) -> int:
        """Free bytes on one device; negative if the plan does not fit."""
        return self.gpu.pool_bytes - self.per_device["total_bytes"]

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives of the main program."""
        return next(program.collectives for program in self.programs if program.name == self.main_program)

    @property
    def communication(self) -> list[Communication]:
        """Of the main program, by mesh axes."""
        return communication(self.collectives, self.mesh, self.gpus_per_host, self.gpu.link_bandwidth)

    @property
    def communication_seconds(self) -> float:
        """The least time of the main program's communication, if none of it overlaps."""
        return sum(row.seconds for row in self.communication)

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "fits": self.fits,
            "job": self.job,
            "compiler": self.compiler,
            "gpu": self.gpu.name,
            "num_gpus": self.num_gpus,
            "mesh": dict(self.mesh),
            "per_device": self.per_device,
            "host": {"pinned_bytes": self.host_pinned_bytes},
            "parameters": dict(self.parameters),
            **({"offload": dict(self.offload)} if self.offload else {}),
            "share": dict(self.share),
            "collectives": [dataclasses.asdict(collective) for collective in self.collectives],
            "network": {
                "gpus_per_host": self.gpus_per_host,
                "gbit_s_per_host": NETWORK_GBIT_S,
                "seconds_at_least": self.communication_seconds,
                "axes": [dataclasses.asdict(row) for row in self.communication],
            },
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
    """One object: the plan; or with `sweep` the best one and all of them, best first."""
    report = {"best": plans[0].to_dict(), "plans": [plan.to_dict() for plan in plans]} if sweep else plans[0].to_dict()
    print(json.dumps(report, indent=2))


def print_plan(plan: Plan) -> None:
    """Print the report of one plan to standard output."""
    console = _console()
    console.print(f"{plan.job}, on {plan.num_gpus} × {plan.gpu.name}: {mesh_text(plan.mesh)}", style="bold")
    if plan.compiler == "cpu-estimate":
        console.print(
            "jax's CUDA compiler is not installed (pip install -e '.[plan]'): compiled for the CPU instead. Arguments "
            "are exact; temporaries are an estimate, far too high for bfloat16.",
            style="yellow",
        )
    table = Table(box=None, pad_edge=False)
    table.add_column("per device")
    table.add_column("GiB", justify="right")
    table.add_column("", style="dim")
    for name, size, remark in _memory_rows(plan):
        table.add_row(name, f"{size / GIB:.2f}", remark)
    console.print(table)
    verdict = (
        f"fits, with {plan.headroom / GIB:.2f} GiB of headroom on each device"
        if plan.fits
        else f"does not fit: {-plan.headroom / GIB:.2f} GiB over capacity on each device"
    )
    console.print(verdict, style="bold green" if plan.fits else "bold red")
    fractions = [f"{share * plan.num_gpus:.3f}/{plan.num_gpus} of the {name}" for name, share in plan.share.items()]
    if plan.pinned:
        console.print(f"host: {plan.host_pinned_bytes / GIB:.1f} GiB of pinned memory")
    console.print(f"per-device share: {', '.join(fractions)}")
    if plan.collectives:
        console.print(_collectives_table(plan))
        console.print(_communication_table(plan))
        rates = f"{plan.gpu.link_bandwidth / 1e9:g} GB/s a GPU over {_link(plan.gpu)}"
        rates += f", {NETWORK_GBIT_S:g} Gb/s a host of {plan.gpus_per_host} GPUs over the network"
        console.print(f"rates: {rates}", style="dim")
    for name, value in plan.roofline.items():
        console.print(f"roofline: {name.replace('_', ' ')} {_rounded(value)}")
    for note in plan.notes:
        console.print(note, style="dim")


def _console() -> Console:
    """Standard output without markup: names, paths and commands may contain brackets and colons."""
    return Console(markup=False, emoji=False)


def _memory_rows(plan: Plan) -> list[tuple[str, int, str]]:
    """(purpose, bytes, remark) of each part that is not empty, then the total and the capacity."""
    sizes = plan.per_device
    largest = max(plan.programs, key=lambda program: program.memory.temporaries + program.memory.results)
    rows = [
        *((f"parameters, {part}", size, "") for part, size in plan.parameters.items()),
        ("optimizer state", plan.optimizer, ""),
        ("gradients", plan.gradients, ""),
        ("KV cache", plan.kv_cache, ""),
        ("inputs", plan.inputs, "all other arguments of the programs"),
        ("temporaries", plan.temporaries, f"largest in: {largest.name}"),
        ("reserve", sizes["reserve_bytes"], "autotuned kernels' workspaces, gaps: not compiled"),
    ]
    return [
        *(row for row in rows if row[1]),
        ("total", sizes["total_bytes"], ""),
        ("capacity", sizes["capacity_bytes"], f"XLA's pool on {plan.gpu.name}, of {plan.gpu.memory_bytes / GIB:.2f}"),
    ]


def _collectives_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"collectives of: {plan.main_program}")
    table.add_column("mesh axes")
    table.add_column("count", justify="right")
    table.add_column("MiB per device", justify="right")
    for collective in plan.collectives:
        table.add_row(
            collective.kind, " × ".join(collective.axes), str(collective.count), f"{collective.bytes / 2**20:,.2f}"
        )
    return table


def _communication_table(plan: Plan) -> Table:
    """By mesh axes: where the bytes go, and how long they take at least."""
    table = Table(box=None, pad_edge=False)
    table.add_column("communication along")
    table.add_column("over")
    table.add_column("MiB sent per device", justify="right")
    table.add_column("MiB out of a host", justify="right")
    table.add_column("ms at least", justify="right")
    for row in plan.communication:
        table.add_row(
            " × ".join(row.axes),
            "network" if row.cross_host_bytes else _link(plan.gpu),
            f"{row.sent_bytes / 2**20:,.2f}",
            f"{row.cross_host_bytes / 2**20:,.2f}",
            _rounded(row.seconds * 1e3),
        )
    return table


def _link(gpu: Gpu) -> str:
    """What connects the GPUs of a host."""
    return "NVLink" if gpu.nvlink_gb_s else "PCIe"


def print_sweep(plans: Sequence[Plan]) -> None:
    """Print plans one per line, best first, and the command of the best one that fits."""
    console = _console()
    table = Table(box=None, pad_edge=False)
    for name in ("mesh", "config", "GiB per device", "headroom", "tokens/s at most", "GiB out of a host"):
        table.add_column(name, justify="left" if name in ("mesh", "config") else "right")
    for plan in plans:
        table.add_row(
            mesh_text(plan.mesh),
            plan.job.partition(": ")[2],
            f"{plan.per_device['total_bytes'] / GIB:.2f}",
            f"{plan.headroom / GIB:+.2f}",
            _rounded(plan.tokens_per_second),
            _rounded(sum(row.cross_host_bytes for row in plan.communication) / GIB),
            style=None if plan.fits else "dim",
        )
    console.print(table)
    if plans[0].fits:
        console.print(f"run: {plans[0].command}", highlight=False, soft_wrap=True)
    else:
        console.print(f"none fits on {plans[0].num_gpus} × {plans[0].gpu.name}", style="bold red")


def mesh_text(mesh: Mapping[str, int]) -> str:
    """The mesh axes of size above 1."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
