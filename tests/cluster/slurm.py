"""A SLURM cluster on this machine: slurmctld and a slurmd for each node, with munge. It needs root and slurm-wlm.

A job that is requeued waits until its credentials have expired, here for five seconds. A node's name is a loopback
address, so that the name of the first one resolves without an entry in /etc/hosts.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue")

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
FirstJobId={first_job}
SchedulerParameters=sched_interval=1,batch_sched_delay=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AccountingStorageType=accounting_storage/none
NodeName=127.0.0.[2-{last}] NodeAddr=127.0.0.[2-{last}] NodeHostname=localhost Port=[{first_port}-{last_port}] CPUs=8
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """The cluster's commands. `environment` is what they need to find it."""

    def __init__(self, folder: Path):
        self.folder, self.environment = folder, os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def command(self, *argv: object) -> str:
        """The standard output of a command of SLURM."""
        done = subprocess.run(
            list(map(str, argv)), env=self.environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job, such as RUNNING or COMPLETED."""
        fields = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.partition("=")[2] for field in fields if field.startswith("JobState="))

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> str:
        """The job's state, once it is one of `states`."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {states}"
            time.sleep(0.2)
        return state


@contextlib.contextmanager
def slurm(folder: Path, num_nodes: int) -> Iterator[Slurm]:
    """A cluster of `num_nodes` nodes, with its files in `folder`; its daemons end with the context."""
    ports = _free_ports(num_nodes + 1)
    (folder / "state").mkdir(parents=True)
    (key := folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    first, last = 2, num_nodes + 1
    config = _CONFIG.format(
        folder=folder,
        host=socket.gethostname(),
        controller_port=ports[0],
        last=last,
        # Of two clusters at a time: jax takes the coordinator's port from the number of the job.
        first_job=16 * os.getpid() % 4000 + 1,
        first_port=ports[1],
        last_port=ports[-1],
    )
    (folder / "slurm.conf").write_text(config)
    cluster = Slurm(folder)
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    daemons = [["munged", "--foreground", "--force", *munge, f"--key-file={key}"], ["slurmctld", "-D"]]
    daemons += [["slurmd", "-D", "-N", f"127.0.0.{node}"] for node in range(first, last + 1)]
    started = []
    try:
        for argv in daemons:
            log = (folder / f"{argv[0]}-{len(started)}.output").open("w")
            started.append(subprocess.Popen(argv, env=cluster.environment, stdout=log, stderr=log))
            if argv[0] == "munged":
                _wait_until((folder / "munge.socket").exists, "munged")
        _wait_until(lambda: _num_idle(cluster) == num_nodes, "slurmd")
        yield cluster
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(started):
            process.wait(timeout=30)


def _num_idle(cluster: Slurm) -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-t", "idle"], env=cluster.environment, capture_output=True, text=True)
    return len(done.stdout.splitlines())


def _wait_until(is_ready, name: str) -> None:
    deadline = time.monotonic() + 60
    while not is_ready():
        assert time.monotonic() < deadline, f"{name} did not start"
        time.sleep(0.1)


def _free_ports(count: int) -> range:
    """Ports in a row that nothing listens at, below those that the kernel gives to clients."""
    for first in range(20000 + os.getpid() % 8000, 32000, count):
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError):
            for port in range(first, first + count):
                sockets.enter_context(socket.socket()).bind(("", port))
            return range(first, first + count)
    raise AssertionError("no ports are free")
