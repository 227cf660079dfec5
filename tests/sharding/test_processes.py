"""Initialisation of several processes, and its errors."""

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
"""The first of the ports that jax derives from SLURM job ids."""

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
    ("processes", "message"),
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
def test_invalid_options(processes, message):
    with pytest.raises(LayoutError, match=message):
        processes.check()


def test_unreachable_coordinator(free_port):
    with pytest.raises(LayoutError, match=f"--coordinator localhost:{free_port}: nothing answers there"):
        sharding.start_processes(Processes(f"localhost:{free_port}", 2, 1), seconds=0.2)
    with pytest.raises(LayoutError, match=r"--coordinator nowhere\.invalid:1: nothing answers there"):
        sharding.start_processes(Processes("nowhere.invalid:1", 2, 1), seconds=60.0)


def test_occupied_port(free_port):
    with socket.socket() as taken:
        taken.bind(("", free_port))
        taken.listen()
        with pytest.raises(LayoutError, match=r"cannot listen there .*choose another port"):
            sharding.start_processes(Processes(f"localhost:{free_port}", 2, 0))


def test_single_process():
    assert sharding.start_processes() == 1
    sharding.check_processes(sharding.make_mesh())


def test_mesh_without_a_device_of_every_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LayoutError, match="the mesh has 4 devices and the 2 processes have 8"):
        sharding.check_processes(sharding.make_mesh(tensor=4))


def test_slurm_environment(free_port):
    """The port follows from the job id."""
    job = {"SLURM_JOB_ID": str(free_port - FIRST_PORT), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = [start(60, job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in outputs] == ["0 2 4 2\n", "1 2 4 2\n"], outputs


def test_open_mpi_without_a_first_host(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    with pytest.raises(LayoutError, match=r"Open MPI 5 does not name the first host.*--num-processes 2 --process-id"):
        sharding.start_processes()


def test_timeout_is_reported(free_port):
    process = start(1, {}, f"localhost:{free_port}", "2", "0")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith(
        f"error: --coordinator localhost:{free_port}: not all processes connected"
    )


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
