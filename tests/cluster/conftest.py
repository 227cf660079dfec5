"""Launchers and hosts on this machine. What they need is installed by CI; elsewhere these tests skip."""

import os
import shutil

import pytest

from tests.cluster import hosts
from tests.cluster.hosts import two_hosts
from tests.cluster.slurm import PROGRAMS, slurm
from tests.cluster.training import Training


def require(packages: str, *programs: str) -> None:
    """Skip unless this is root, and the programs are there."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to run the daemons of a cluster")
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install {packages}")


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory):
    """SLURM with three nodes."""
    require("slurm-wlm munge", *PROGRAMS)
    with slurm(tmp_path_factory.mktemp("slurm"), num_nodes=3) as cluster:
        yield cluster


@pytest.fixture
def mpirun():
    """The beginning of a command of Open MPI."""
    require("openmpi-bin", "mpirun")
    return ["mpirun", "--allow-run-as-root", "--oversubscribe"]


@pytest.fixture
def ssh_hosts(tmp_path):
    """Two hosts that ssh reaches."""
    require("openssh-server openssh-client iproute2", *hosts.PROGRAMS)
    with two_hosts(tmp_path / "hosts") as found:
        yield found


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("training"))
