"""Overhead of a training step on a mesh of simulated devices over one device, on the same CPU cores.

python benchmarks/mesh_scaling.py [--devices 2 4 8] [--json FILE]

Simulated devices add no cores: without overhead a step on a mesh would take as long as on one device. Two parts of
the overhead are measured on their own: the optimizer update, which is repeated where parameters are replicated, and the
collectives of the compiled step, each with one addition to its input. Steps on the mesh and on one device alternate.
"""

import argparse
import dataclasses
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
from jobs import Step, synthetic_arrays, time_once, training_step

import sharding
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.costs import Workload, forward_flops
from sphinx_jax.memory_plan.aot import hlo_text
from sphinx_jax.memory_plan.hlo import Collective, collectives
from sphinx_jax.training.step import Params
from sphinx_jax.training.train_state import init_state

CONFIG = SphinxConfig(
    DecoderConfig(dim=256, hidden_dim=512, num_layers=4, num_heads=8, num_kv_heads=8, vocab_size=4096), None
)
"""15 million parameters; every sharded dimension is divisible by eight."""

BATCH_SIZE, LENGTH = 8, 256
REPETITIONS = 7


def measure(axis: str, devices: int, tokens: np.ndarray) -> dict:
    """Seconds of a step on `devices` along `axis` and on one device, and of the parts of the overhead."""
    mesh = sharding.make_mesh(**dataclasses.asdict(sharding.MeshShape(**{axis: devices})))
    on_mesh, on_one = training_step(CONFIG, tokens, "float32", mesh), training_step(CONFIG, tokens, "float32")
    communication = collectives(hlo_text(on_mesh.compiled), mesh)
    runs = [on_mesh.run, on_one.run, update(on_mesh, mesh), update(on_one, sharding.make_mesh())]
    runs.append(run_collectives(communication, mesh))
    for run in runs:
        run()
    times = [[time_once(run) for run in runs] for _ in range(REPETITIONS)]
    step, one_device, step_update, one_update, collective = (
        statistics.median(seconds) for seconds in zip(*times, strict=True)
    )
    params = on_mesh.program.params["model"]
    flops = forward_flops(CONFIG, params, mesh, Workload(BATCH_SIZE, LENGTH, (LENGTH + 1) // 2, LENGTH))["language"]
    return {
        "axis": axis,
        "devices": devices,
        "step_seconds": step,
        "one_device_seconds": one_device,
        "relative_flops": flops.per_device_max * devices / flops.total,
        "update_seconds": step_update - one_update,
        "collectives_seconds": collective,
        "collectives_count": sum(c.count for c in communication),
        "collectives_mib": sum(c.bytes for c in communication) * devices / 2**20,
    }


def update(step: Step, mesh: Mesh) -> Callable[[], None]:
    """The optimizer update of a step alone, with the parameters as gradients."""
    optimizer, params = step.program.optimizer, synthetic_arrays(step.program.params)
    opt_state = init_state(params, optimizer, mesh).opt_state

    def apply(params: Params, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = sharding.Program(apply, (0, 1)).compile((params, opt_state), mesh)
    states = [(params, opt_state)]

    def run() -> None:
        states.append(jax.block_until_ready(compiled(*states.pop())))

    return run


def run_collectives(communication: list[Collective], mesh: Mesh) -> Callable[[], None]:
    """Collectives of the same kinds, counts and bytes, without the rest of the step."""
    operations: dict[str, Callable] = {
        "all-reduce": jax.lax.psum,
        "all-gather": partial(jax.lax.all_gather, tiled=True),
        "reduce-scatter": partial(jax.lax.psum_scatter, tiled=True),
    }

    def run_all(*shards: jax.Array) -> jax.Array:
        """On one device: every input depends on the previous result, so that nothing is merged or left out."""
        total = jnp.zeros(())
        for collective, shard in zip(communication, shards, strict=True):

            def run_one(_: Any, total: jax.Array, c: Collective = collective, x: jax.Array = shard) -> jax.Array:
                return total + operations[c.kind](x + total, c.axes).ravel()[0]

            total = jax.lax.fori_loop(0, collective.count, run_one, total)
        return total[None]

    def make_input(collective: Collective) -> jax.Array:
        elements = collective.bytes // collective.count // 4
        local = elements // mesh.size if collective.kind == "all-gather" else elements // mesh.size * mesh.size
        return jax.device_put(np.zeros(max(local, 1) * mesh.size, np.float32), NamedSharding(mesh, sharded))

    sharded = PartitionSpec(sharding.AXES)
    compiled = jax.jit(jax.shard_map(run_all, mesh=mesh, in_specs=sharded, out_specs=sharded, check_vma=False))
    inputs = [make_input(collective) for collective in communication]
    return lambda: jax.block_until_ready(compiled(*inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8], help="numbers of devices along one axis")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    sharding.simulate_devices(max(options.devices))
    tokens = np.random.default_rng(0).integers(3, CONFIG.language.vocab_size, (BATCH_SIZE, LENGTH)).astype(np.int32)
    batch = f"{BATCH_SIZE} x {LENGTH} tokens"
    print(f"{time.strftime('%Y-%m-%d')}, jax {jax.__version__}, a training step of {batch}, float32\n")
    print("| axis | devices | step, ms | step / one device | relative FLOPs | update | collectives | other |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for axis in sharding.AXES:
        for devices in options.devices:
            row = measure(axis, devices, tokens)
            rows.append(row)
            # Relative to the step on one device.
            step, update, collective = (
                row[f"{part}_seconds"] / row["one_device_seconds"] for part in ("step", "update", "collectives")
            )
            cells = (
                axis,
                devices,
                f"{row['step_seconds'] * 1e3:.0f}",
                f"{step:.2f}",
                f"{row['relative_flops']:.2f}",
                f"{update:.2f}",
                f"{collective:.2f} ({row['collectives_count']} of {row['collectives_mib']:.0f} MiB in total)",
                f"{step - 1 - update - collective:.2f}",
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
