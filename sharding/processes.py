"""Multi-process programs, on one host or many: initialising jax.distributed, broadcasts and barriers."""

import dataclasses
import math
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather, sync_global_devices
from jax.sharding import Mesh

from sharding.errors import LayoutError
from sharding.process_end import exit_now, report_sudden_end

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The identity of this process in a multi-process program: all three options, or none."""

    coordinator: str | None = None
    """HOST:PORT of process 0, for programs of several processes; each is started with these three options. SLURM's
    srun and Open MPI's mpirun need none of them."""
    num_processes: int | None = None
    """The number of processes."""
    process_id: int | None = None
    """The index of this process, from 0 on."""

    def check(self) -> None:
        """Check the options. Raises LayoutError if only some are given, or their values are impossible."""
        given = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(self).items()}
        missing = [flag for flag, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        if missing:
            raise LayoutError(f"{', '.join(given)} go together; {' and '.join(missing)} is missing")
        assert self.coordinator is not None and self.num_processes is not None and self.process_id is not None
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise LayoutError(f"--coordinator {self.coordinator}: must be HOST:PORT, such as node1:29500")
        if self.num_processes < 1 or not 0 <= self.process_id < self.num_processes:
            raise LayoutError(
                f"--process-id {self.process_id} of --num-processes {self.num_processes}: count them from 0 to "
                f"{max(self.num_processes, 1) - 1}"
            )


NO_PROCESSES = Processes()


class _Launch(NamedTuple):
    """How the launcher names the processes: for messages, as numbers, and as arguments of jax's initialisation."""

    where: str
    process_id: int
    num_processes: int
    arguments: dict[str, Any]


def start_processes(processes: Processes = NO_PROCESSES, seconds: float = 300.0, catch_sigterm: bool = True) -> int:
    """Initialise jax.distributed if the options, Open MPI or SLURM name several processes; returns their number.

    Call it before the first use of jax's devices, which are those of all processes from then on. `catch_sigterm`:
    SIGTERM does not end a process, but is a notice of preemption for all of them. Raises LayoutError if process 0
    cannot listen or does not answer. If the other processes do not connect within `seconds`, an error is printed and
    this process exits with code 2.
    """
    processes.check()
    launch = _by_options(processes, seconds) or _by_open_mpi(os.environ) or _by_slurm(os.environ)
    if launch is None:
        return 1
    message = f"error: {launch.where}: not all processes connected within {seconds:g} s; start them all"
    # A thread ends the process: the main thread waits inside jax.
    timeout = threading.Timer(seconds, exit_now, [2, message])
    timeout.daemon = True
    timeout.start()
    jax.config.update("jax_enable_preemption_service", catch_sigterm)
    try:
        # jax's own timeout is later: it aborts the process with a stack trace.
        jax.distributed.initialize(**launch.arguments, initialization_timeout=math.ceil(seconds) + 60)
    finally:
        timeout.cancel()
    report_sudden_end(launch.process_id, launch.num_processes)
    # Not jax.process_count(), which starts the backend: simulate_devices must still be possible.
    return launch.num_processes


def _by_options(processes: Processes, seconds: float) -> _Launch | None:
    """Raises LayoutError if process 0 cannot listen, or does not do so within `seconds`."""
    if processes.coordinator is None or processes.num_processes is None or processes.process_id is None:
        return None
    where = f"--coordinator {processes.coordinator}"
    host, _, port = processes.coordinator.rpartition(":")
    if processes.process_id == 0:
        _check_port_free(where, int(port))
    else:
        _wait_for_coordinator(where, host.strip("[]"), int(port), seconds)
    arguments = {
        "coordinator_address": processes.coordinator,
        "num_processes": processes.num_processes,
        "process_id": processes.process_id,
        "cluster_detection_method": "deactivate",
    }
    return _Launch(where, processes.process_id, processes.num_processes, arguments)


def _by_open_mpi(environment: Mapping[str, str]) -> _Launch | None:
    """By the variables of mpirun. They precede SLURM's, whose tasks may be the daemons of Open MPI."""
    num_processes = int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    if num_processes == 1:
        return None
    if "OMPI_MCA_orte_hnp_uri" not in environment:
        raise LayoutError(
            "Open MPI 5 does not name the first host, unlike version 4: give --coordinator HOST:PORT --num-processes "
            f"{num_processes} --process-id $OMPI_COMM_WORLD_RANK, from a shell that mpirun starts"
        )
    rank = int(environment["OMPI_COMM_WORLD_RANK"])
    return _Launch("mpirun", rank, num_processes, {"cluster_detection_method": "ompi"})


def _by_slurm(environment: Mapping[str, str]) -> _Launch | None:
    """By the variables of srun. A batch script without srun is one process, whatever its job's number of tasks."""
    num_processes = int(environment.get("SLURM_NTASKS", 1))
    if num_processes == 1 or "SLURM_STEP_NODELIST" not in environment:
        return None
    where = f"SLURM step on {environment['SLURM_STEP_NODELIST']}"
    return _Launch(where, int(environment["SLURM_PROCID"]), num_processes, {"cluster_detection_method": "slurm"})


def _check_port_free(where: str, port: int) -> None:
    """Raises LayoutError if this host cannot listen on `port`."""
    with socket.socket() as server:
        # Connections in TIME_WAIT do not block a server with this option, nor this check.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            raise LayoutError(f"{where}: cannot listen there ({error.strerror}); choose another port") from error


def _wait_for_coordinator(where: str, host: str, port: int, seconds: float) -> None:
    """Return once host:port accepts connections. Raises LayoutError after `seconds`, or if `host` does not resolve."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() > deadline:
                raise LayoutError(
                    f"{where}: nothing answers there ({error.strerror or error}); start process 0 on that host, and "
                    "let the others through to its port"
                ) from error
        time.sleep(min(0.5, seconds))


def check_processes(mesh: Mesh) -> None:
    """Raises LayoutError if a process of this program has no device in `mesh`."""
    if {device.process_index for device in mesh.devices.flat} != set(range(jax.process_count())):
        raise LayoutError(
            f"the mesh has {mesh.size} devices and the {jax.process_count()} processes have {jax.device_count()}; "
            "choose a mesh of all devices, or start fewer processes"
        )


def broadcast_from_primary(make: Callable[[], T]) -> T:
    """Call `make` in process 0 and return its result in every process; an exception is raised in every process too.

    This is a collective: all processes must call it at the same point of the program. The result must pickle.
    """
    if jax.process_count() == 1:
        return make()
    payload = b""
    if jax.process_index() == 0:
        try:
            payload = pickle.dumps((make(), None))
        except Exception as error:
            payload = pickle.dumps((None, error))
    length = int(broadcast_one_to_all(np.int32(len(payload))))
    # Each buffer size compiles a program of its own: round up to a power of two.
    buffer = np.zeros(1 << (length - 1).bit_length(), np.uint8)
    buffer[: len(payload)] = np.frombuffer(payload, np.uint8)
    value, error = pickle.loads(np.asarray(broadcast_one_to_all(buffer))[:length].tobytes())
    if error is not None:
        raise error
    return value


def broadcast_each_from_primary(items: Iterable[T]) -> Iterator[T]:
    """Yield the items of process 0 in every process, one broadcast per item. None ends the iteration."""
    source = iter(items)
    while (item := broadcast_from_primary(lambda: next(source, None))) is not None:
        yield item


def least_of_processes(num_bytes: int) -> int:
    """The least of the processes' numbers, rounded down to MiB. A collective: all processes must call it."""
    if jax.process_count() == 1:
        return num_bytes
    return int(process_allgather(np.int32(num_bytes >> 20)).min()) << 20


def is_primary_process() -> bool:
    """Whether this is process 0, the one that writes files and logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Block until every process has reached the barrier `name`; a no-op with one process."""
    if jax.process_count() > 1:
        sync_global_devices(name)
