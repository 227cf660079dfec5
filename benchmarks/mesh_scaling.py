"""What a training step costs more on a mesh than on one device, where both have the same two cores to run on.

python benchmarks/mesh_scaling.py [--devices 2 4 8] [--json FILE]

Simulated devices add no processor: if a mesh did nothing but share the work out, it would take as long as one device.
What it takes longer for is measured by itself: updating parameters, of which devices may hold the same (with the sum
of the gradients' norm), and the exchanges of the compiled step, with one addition to what each sends. Steps on the mesh
and on one device alternate.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jobs import Step, clock, made_up, training_step

import sharding
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.costs import Work, forward_flops
from sphinx_jax.memory_plan.hlo import Collective, collectives
from sphinx_jax.training.step import Params
from sphinx_jax.training.train_state import init_state

CONFIG = SphinxConfig(
    DecoderConfig(dim=256, hidden_dim=512, num_layers=4, num_heads=8, num_kv_heads=8, vocab_size=4096), None
)
"""15 million parameters, and every dimension that a mesh splits can be split in eight."""

MAX_NUM_SEQS, LENGTH = 8, 256
REPETITIONS = 7


def measure(axis: str, devices: int, tokens: np.ndarray) -> dict:
    """Seconds of a step on `devices` along `axis` and on one, and of what the mesh does besides sharing out."""
    mesh = sharding.make_mesh(**{axis: devices})
    on_mesh, on_one = training_step(CONFIG, tokens, "float32", mesh), training_step(CONFIG, tokens, "float32")
    exchanged = collectives(on_mesh.compiled.as_text(), mesh)
    jobs = [on_mesh.run, on_one.run, update(on_mesh, mesh), update(on_one, sharding.make_mesh())]
    jobs.append(exchange(exchanged, mesh))
    for run in jobs:
        run()
    times = [[clock(run) for run in jobs] for _ in range(REPETITIONS)]
    several, one, update_several, update_one, exchanges = (statistics.median(job) for job in zip(*times, strict=True))
    params = on_mesh.program.params["model"]
    flops = forward_flops(CONFIG, params, mesh, Work(MAX_NUM_SEQS, LENGTH, (LENGTH + 1) // 2, LENGTH))["language"]
    return {
        "axis": axis,
        "devices": devices,
        "step_s": several,
        "one_device_s": one,
        "products": flops.busiest * devices / flops.total,
        "update_s": update_several - update_one,
        "exchange_s": exchanges,
        "exchanges": sum(c.count for c in exchanged),
        "exchanged_mib": sum(c.bytes for c in exchanged) * devices / 2**20,
    }


def update(step: Step, mesh: Mesh) -> Callable[[], None]:
    """The optimizer's part of a step alone: gradients as large as the weights."""
    optimizer, params = step.program.optimizer, made_up(step.program.params)
    state = init_state(params, optimizer, mesh).optimizer

    def updated(params: Params, state: Any) -> tuple[Params, Any]:
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    compiled = sharding.Program(updated, (0, 1)).compile((params, state), mesh)
    kept = [(params, state)]

    def run() -> None:
        kept.append(jax.block_until_ready(compiled(*kept.pop())))

    return run


def exchange(exchanged: list[Collective], mesh: Mesh) -> Callable[[], None]:
    """As many exchanges of each kind, of as many bytes."""
    calls = {
        "all-reduce": jax.lax.psum,
        "all-gather": partial(jax.lax.all_gather, tiled=True),
        "reduce-scatter": partial(jax.lax.psum_scatter, tiled=True),
    }

    def each(*parts: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for collective, part in zip(exchanged, parts, strict=True):
            call = lambda _, total, c=collective, x=part: total + calls[c.kind](x + total, c.axes).ravel()[0]
            total = jax.lax.fori_loop(0, collective.count, call, total)
        return total[None]

    def part(collective: Collective) -> jax.Array:
        numbers = collective.bytes // collective.count // 4
        own = numbers // mesh.size if collective.kind == "all-gather" else numbers // mesh.size * mesh.size
        return jax.device_put(np.zeros(max(own, 1) * mesh.size, np.float32), NamedSharding(mesh, devices))

    devices = PartitionSpec(sharding.AXES)
    run = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=devices, out_specs=devices, check_vma=False))
    parts = [part(collective) for collective in exchanged]
    return lambda: jax.block_until_ready(run(*parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8], help="how many along one axis")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    sharding.simulate_devices(max(options.devices))
    tokens = np.random.default_rng(0).integers(3, CONFIG.language.vocab_size, (MAX_NUM_SEQS, LENGTH)).astype(np.int32)
    print(
        f"{time.strftime('%Y-%m-%d')}, jax {jax.__version__}, a training step of {MAX_NUM_SEQS} x {LENGTH} words, float32\n"
    )
    print("| axis | devices | step, ms | of one device's | products | update | exchanges | the rest |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for axis in sharding.AXES:
        for devices in options.devices:
            row = measure(axis, devices, tokens)
            rows.append(row)
            share = lambda seconds, one=row["one_device_s"]: f"{seconds / one:.2f}"
            more = row["step_s"] - row["one_device_s"]
            cells = (
                axis,
                devices,
                f"{row['step_s'] * 1e3:.0f}",
                share(row["step_s"]),
                f"{row['products']:.2f}",
                share(row["update_s"]),
                f"{share(row['exchange_s'])} ({row['exchanges']} of {row['exchanged_mib']:.0f} MiB in all)",
                share(more - row["update_s"] - row["exchange_s"]),
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
