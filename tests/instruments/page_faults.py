"""Program: page faults of six training steps of a preset, and the time of one, as one JSON line.

python -m tests.instruments.page_faults PRESET BATCH_SIZE [keep]    with `keep`, as train.py sets malloc
"""

import json
import resource
import sys
import time

import jax
import numpy as np

import sharding
from sphinx_jax.cli.startup import keep_freed_memory, prepare_process
from sphinx_jax.config import preset
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig
from sphinx_jax.training.train_state import init_state
from sphinx_jax.training.trainer import initial_params, shard_batch

WARM_UP, STEPS, LENGTH = 6, 6, 256


def main(name: str, batch_size: int, keep: bool) -> None:
    if keep:
        prepare_process()
    config, random = preset(name), np.random.default_rng(0)
    tokens = random.integers(3, config.language.vocab_size, (batch_size, LENGTH)).astype(np.int32)
    batch = {"tokens": tokens, "labels": tokens}
    if config.vision:
        size = config.vision.image_size
        batch["images"] = random.integers(0, 256, (batch_size, size, size, 3), np.uint8)
    mesh = sharding.make_mesh()
    program = train_program(config, TrainConfig(batch_size=batch_size), mesh)
    params = {name: initial_params(program, name, None) for name in program.state.params}
    state = init_state(params, program.optimizer, mesh)
    sharded = shard_batch(batch, mesh)
    compiled = program.step.compile((program.state, sharded, {}), mesh)
    if keep:
        keep_freed_memory()
    for step in range(-WARM_UP, STEPS):
        if step == 0:
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        state = jax.block_until_ready(compiled(state, sharded, {})[0])
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "faults": after.ru_minflt - before.ru_minflt,
                "tokens_per_second": STEPS * tokens.size / seconds,
                "user": after.ru_utime - before.ru_utime,
                "sys": after.ru_stime - before.ru_stime,
                "peak_mib": after.ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "keep" in sys.argv[3:])
