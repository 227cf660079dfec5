"""Several processes coming together, or not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import sharding
from sharding import LayoutError, Processes

ROOT = Path(__file__).parents[2]

FIRST_PORT = 65535 - 2**12 + 1
"""Of those that jax derives from SLURM's job numbers."""

PROGRAM = """
import sys
import sharding
seconds, *flags = sys.argv[1:]
count = sharding.start_processes(sharding.Processes(*flags[:1], *map(int, flags[1:])), float(seconds))
sharding.simulate_devices(2)
import jax
assert count == jax.process_count()
print(jax.process_index(), jax.process_count(), jax.device_count(), jax.local_device_count())
"""


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        (Processes("node1:29500"), "go together; --num-processes and --process-id is missing"),
        (Processes(process_id=0, num_processes=1), "go together; --coordinator is missing"),
        (Processes("node1", 2, 0), "--coordinator node1: must be HOST:PORT"),
        (Processes(":29500", 2, 0), "must be HOST:PORT"),
        (Processes("node1:70000", 2, 0), "must be HOST:PORT"),
        (Processes("node1:29500", 2, 2), "count them from 0 to 1"),
        (Processes("node1:29500", 0, 0), "count them from 0 to 0"),
    ],
)
def test_half_an_answer_is_refused(processes, said):
    with pytest.raises(LayoutError, match=said):
        processes.check()


def test_a_coordinator_that_is_not_there(free_port):
    with pytest.raises(LayoutError, match=f"--coordinator localhost:{free_port}: nothing answers there"):
        sharding.start_processes(Processes(f"localhost:{free_port}", 2, 1), seconds=0.2)
    with pytest.raises(LayoutError, match=r"--coordinator nowhere\.invalid:1: nothing answers there"):
        sharding.start_processes(Processes("nowhere.invalid:1", 2, 1), seconds=60)


def test_a_port_that_is_taken(free_port):
    with socket.socket() as taken:
        taken.bind(("", free_port))
        taken.listen()
        with pytest.raises(LayoutError, match=r"cannot listen there .*choose another port"):
            sharding.start_processes(Processes(f"localhost:{free_port}", 2, 0))


def test_alone_nothing_is_started():
    assert sharding.start_processes() == 1
    sharding.check_processes(sharding.make_mesh())


def test_every_process_has_a_device(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LayoutError, match="the mesh has 4 devices and the 2 processes have 8"):
        sharding.check_processes(sharding.make_mesh(tensor=4))


def test_slurm_says_who_is_who(free_port):
    """The port follows from the job's number."""
    job = {"SLURM_JOB_ID": str(free_port - FIRST_PORT), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    started = [start(60, job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [out for out, _ in outputs] == ["0 2 4 2\n", "1 2 4 2\n"], outputs


def test_one_that_stays_alone_says_so(free_port):
    process = start(1, {}, f"localhost:{free_port}", "2", "0")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith(f"error: --coordinator localhost:{free_port}: not all processes came")


def start(seconds, variables, *flags):
    argv = [sys.executable, "-c", PROGRAM, str(seconds), *flags]
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def free_port():
    for port in range(FIRST_PORT, 65536):
        with socket.socket() as free:
            try:
                free.bind(("localhost", port))
            except OSError:
                continue
            return port
