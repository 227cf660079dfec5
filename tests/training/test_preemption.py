"""SIGTERM at the end of a run of several processes: nobody waits for a process that hears of it no more."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys, time
import sharding
address, process_id = sys.argv[1:]
sharding.start_processes(sharding.Processes(address, 2, int(process_id)))
sharding.simulate_devices(1)
from sphinx_jax.training.preemption import PreemptionGuard
with PreemptionGuard() as guard:
    assert not guard.should_stop()
    sharding.barrier("the last step")
if process_id == "1":
    # The other leaves at once. jax looks for signals once a second.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2.5)
"""


@pytest.mark.slow
def test_sigterm_after_the_last_step():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", PROGRAM, address]
    processes = [subprocess.Popen([*argv, str(i)], env=environment) for i in range(2)]
    try:
        assert [process.wait(timeout=90) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
