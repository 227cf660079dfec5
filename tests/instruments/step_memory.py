"""Program: the host memory of training steps on one CPU device, planned and measured, as JSON lines.

python -m tests.instruments.step_memory '[{"remat": "block"}, ...]'    options of TrainConfig, one dict per step
"""

import ctypes
import gc
import json
import mmap
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from sharding import MeshShape
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan import aot
from sphinx_jax.memory_plan.report import RESERVE_BYTES
from sphinx_jax.memory_plan.training import training_batch, training_plan
from sphinx_jax.training.program import TrainProgram, train_program
from sphinx_jax.training.step import Params
from sphinx_jax.training.train_config import TrainConfig
from sphinx_jax.training.train_state import init_state
from sphinx_jax.training.trainer import shard_batch

CONFIG = SphinxConfig(DecoderConfig(128, 256, 4, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=512), None)
LENGTH, BATCH_SIZE, REPETITIONS = 256, 32, 3


def resident_bytes() -> int:
    """Resident memory without pages of mapped files (shared libraries), which are loaded and evicted at any time."""
    _, pages, file_pages, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (pages - file_pages) * mmap.PAGESIZE


def idle_bytes() -> int:
    """Resident memory after everything that is free has been returned to the operating system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident_bytes()


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak resident memory while `run` runs, sampled every millisecond."""
    samples, done = [resident_bytes()], threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(resident_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(samples)


def constant_params(program: TrainProgram) -> dict[str, Params]:
    """Parameters of one value: where it does not matter, random ones take longer to compile than a step."""
    return jax.tree.map(lambda p: jnp.full(p.shape, 0.01, p.dtype, device=p.sharding), dict(program.state.params))


def measure(train_config: TrainConfig, host_batch: dict[str, np.ndarray]) -> int:
    """Bytes that one step takes with its arguments: the least of several measurements, which others only add to."""
    mesh = sharding.make_mesh()
    program = train_program(CONFIG, train_config, mesh)
    originals = init_state(constant_params(program), program.optimizer, mesh), shard_batch(host_batch, mesh)
    step = program.step.compile((*originals, {}), mesh)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    measured = []
    # The first run loads the programs and starts threads, whose memory stays allocated.
    jax.block_until_ready(step(*copy(originals), {}))
    for _ in range(REPETITIONS):
        idle = idle_bytes()
        args = jax.block_until_ready(copy(originals))
        measured.append(peak_bytes(lambda args=args: jax.block_until_ready(step(*args, {}))) - idle)
        del args
    return min(measured)


def main() -> None:
    aot.has_gpu_compiler = lambda: False
    train_configs = [TrainConfig(steps=10, batch_size=BATCH_SIZE, **options) for options in json.loads(sys.argv[1])]
    shapes = training_batch(CONFIG, train_configs[0], LENGTH)
    random = np.random.default_rng(0)
    host_batch = {name: random.integers(1, 512, dims, np.int32) for name, (dims, _) in shapes.items()}
    # All plans first: their compilation must not disturb a measurement.
    plans = [training_plan("small", CONFIG, find_gpu("l4"), MeshShape(), config, shapes) for config in train_configs]
    for train_config, plan in zip(train_configs, plans, strict=True):
        planned = plan.per_device["total_bytes"] - RESERVE_BYTES
        print(json.dumps({"planned": planned, "measured": measure(train_config, host_batch)}))


if __name__ == "__main__":
    main()
