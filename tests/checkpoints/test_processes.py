"""Two processes of four devices each load, save and reload a checkpoint that one process then reads."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import sharding
from sphinx_jax import checkpoints

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
address, process, source, out = sys.argv[1:]
jax.distributed.initialize(coordinator_address=address, num_processes=2, process_id=int(process))

import sharding
from sphinx_jax import checkpoints

loaded = checkpoints.load(source, sharding.make_mesh(fsdp=2, tensor=4), unstacked=False)
checkpoints.save(out + "/native", loaded.config, loaded.params, b"a tokenizer")
reloaded = checkpoints.load(out + "/native", sharding.make_mesh(fsdp=2, expert=2, tensor=2), unstacked=True)
checkpoints.save(out + "/accessory", reloaded.config, reloaded.params, b"a tokenizer", "accessory", 4)
checkpoints.save(out + "/mixtral", loaded.config, loaded.params, b"a tokenizer", "mixtral")
jax.experimental.multihost_utils.sync_global_devices("done")
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes(accessory_directory, weights, ours, same, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    source, out = accessory_directory(shards=2), tmp_path / "out"
    out.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i), str(source), str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for name in ("native", "accessory", "mixtral"):
        same(checkpoints.load(out / name, sharding.make_mesh()).params, ours(weights(), True))
