"""Real launchers start two processes of two devices each: they train as one process of four devices does."""

import subprocess

import pytest

from tests.cluster.training import losses, saved

pytestmark = pytest.mark.cluster

STEPS = 6


@pytest.fixture(scope="module")
def alone(training):
    """The losses of one process."""
    argv = [*training.argv, "--simulate-devices", "4", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    argv += ["--steps", STEPS, "--out", training.folder / "alone"]
    subprocess.run(list(map(str, argv)), env=training.environment, check=True, capture_output=True, timeout=300)
    return losses(training.folder / "alone")


def check(done, out, alone):
    """One process speaks, and all of it is as if it were alone."""
    assert done.returncode == 0, done.stderr
    check_run(done.stdout, out, alone)


def check_run(output, out, alone):
    assert output.count("try it: python infer.py") == 1
    assert losses(out) == pytest.approx(alone, rel=1e-5) and len(alone) == STEPS
    assert saved(out) == [STEPS]


def run(argv, training, out, **environment):
    argv = [*argv, *training.argv, *training.mesh(2), "--steps", STEPS, "--out", out]
    environment = training.environment | environment
    return subprocess.run(list(map(str, argv)), env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_srun(slurm_cluster, training, alone):
    out = training.folder / "srun"
    config = slurm_cluster.environment["SLURM_CONF"]
    done = run(["srun", "--nodes", 2, "--ntasks-per-node", 1], training, out, SLURM_CONF=config)
    check(done, out, alone)


@pytest.mark.slow
def test_mpirun(mpirun, training, alone):
    out = training.folder / "mpirun"
    check(run([*mpirun, "-n", 2], training, out), out, alone)


@pytest.mark.slow
def test_ssh(ssh_hosts, training, alone, tmp_path):
    """Between two hosts with names and addresses of their own, where network namespaces are permitted."""
    out = training.folder / "ssh"
    first = ssh_hosts.first
    coordinator = f"{first.name if first.link else first.address}:29500"
    options = [*training.mesh(2), "--steps", STEPS, "--out", out, "--coordinator", coordinator, "--num-processes", 2]
    started = [
        ssh_hosts.ssh(host, training.shell(*options, "--process-id", i), tmp_path / f"output{i}")
        for i, host in enumerate((first, ssh_hosts.second))
    ]
    codes = [process.wait(timeout=240) for process in started]
    outputs = [(tmp_path / f"output{i}").read_text() for i in range(2)]
    assert codes == [0, 0], outputs
    check_run("".join(outputs), out, alone)
