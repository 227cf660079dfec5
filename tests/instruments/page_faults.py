"""Program: page faults of six training steps of a preset, and the tokens per second, as JSON lines.

python -m tests.instruments.page_faults PRESET BATCH_SIZE [keep | both]

With `keep`, malloc is set as train.py does; with `both`, a line before that and `REPETITIONS` lines after it.
"""

import json
import resource
import sys
import time

import jax
import numpy as np

import sharding
from sphinx_jax.cli.startup import keep_freed_memory, prepare_process
from sphinx_jax.config import PRESETS, DecoderConfig, SphinxConfig, preset
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig
from sphinx_jax.training.train_state import init_state
from sphinx_jax.training.trainer import shard_batch
from tests.instruments.step_memory import constant_params

WARM_UP, STEPS, REPETITIONS, LENGTH = 6, 6, 4, 256

# Compiled in seconds, and its activations are as large as nano's.
PRESETS["small"] = lambda: SphinxConfig(
    DecoderConfig(64, 128, 1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=512), None
)


def main(name: str, batch_size: int, mode: str = "") -> None:
    if mode:
        prepare_process()
    config, random = preset(name), np.random.default_rng(0)
    tokens = random.integers(3, config.language.vocab_size, (batch_size, LENGTH)).astype(np.int32)
    batch = {"tokens": tokens, "labels": tokens}
    if config.vision:
        size = config.vision.image_size
        batch["images"] = random.integers(0, 256, (batch_size, size, size, 3), np.uint8)
    mesh = sharding.make_mesh()
    program = train_program(config, TrainConfig(batch_size=batch_size), mesh)
    state = init_state(constant_params(program), program.optimizer, mesh)
    sharded = shard_batch(batch, mesh)
    compiled = program.step.compile((program.state, sharded, {}), mesh)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state = jax.block_until_ready(compiled(state, sharded, {})[0])

    def measure() -> None:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        run(STEPS)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        values = {
            "faults": after.ru_minflt - before.ru_minflt,
            "tokens_per_second": STEPS * tokens.size / seconds,
            "user": after.ru_utime - before.ru_utime,
            "sys": after.ru_stime - before.ru_stime,
            "peak_mib": after.ru_maxrss // 1024,
        }
        print(json.dumps(values), flush=True)

    if mode == "both":
        run(WARM_UP)
        measure()
    if mode:
        keep_freed_memory()
    run(WARM_UP)
    for _ in range(REPETITIONS if mode == "both" else 1):
        measure()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
