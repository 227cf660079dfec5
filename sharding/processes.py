"""Several processes that run one program together, on one machine or many: how they find each other."""

import dataclasses
import math
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, sync_global_devices
from jax.sharding import Mesh

from sharding.errors import LayoutError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of the processes that run one program together this one is: all three, or none of them."""

    coordinator: str | None = None
    """Of several processes, each started with these three options: HOST:PORT, where the first one listens.
    Under SLURM's srun none of them is needed."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0 on."""

    def check(self) -> None:
        """Raises LayoutError on options that do not go together."""
        given = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(self).items()}
        missing = [flag for flag, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        if missing:
            raise LayoutError(f"{', '.join(given)} go together; {' and '.join(missing)} is missing")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise LayoutError(f"--coordinator {self.coordinator}: must be HOST:PORT, such as node1:29500")
        if self.num_processes < 1 or not 0 <= self.process_id < self.num_processes:
            raise LayoutError(
                f"--process-id {self.process_id} of --num-processes {self.num_processes}: count them from 0 to "
                f"{max(self.num_processes, 1) - 1}"
            )


NO_PROCESSES = Processes()


def start_processes(processes: Processes = NO_PROCESSES, seconds: float = 300) -> int:
    """Join the other processes of this program, if the options or SLURM say that there are some; how many there are.

    Call it before anything asks jax for its devices: they are those of all processes from then on. Raises LayoutError
    where the first process cannot listen or does not answer. If the others do not come within `seconds`, says so and
    ends this process with exit code 2.
    """
    processes.check()
    if processes.coordinator is not None:
        count = processes.num_processes
        where = f"--coordinator {processes.coordinator}"
        chosen = {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.num_processes,
            "process_id": processes.process_id,
            "cluster_detection_method": "deactivate",
        }
        host, _, port = processes.coordinator.rpartition(":")
        if processes.process_id == 0:
            _check_free(where, int(port))
        else:
            _wait_for(where, host.strip("[]"), int(port), seconds)
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        chosen, where = {"cluster_detection_method": "slurm"}, f"SLURM step on {os.environ['SLURM_STEP_NODELIST']}"
        count = int(os.environ["SLURM_NTASKS"])
    else:
        return 1
    late = threading.Timer(seconds, _give_up, [f"{where}: not all processes came within {seconds:g} s; start them all"])
    late.daemon = True
    late.start()
    try:
        # When its own time is up, jax ends the process with a stack trace.
        jax.distributed.initialize(**chosen, initialization_timeout=math.ceil(seconds) + 60)
    finally:
        late.cancel()
    # Asking jax would start it, and devices could not be simulated any more.
    return count


def _check_free(where: str, port: int) -> None:
    with socket.socket() as listening:
        # As for a server: what a connection left behind does not count.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("", port))
        except OSError as error:
            raise LayoutError(f"{where}: cannot listen there ({error.strerror}); choose another port") from error


def _wait_for(where: str, host: str, port: int, seconds: float) -> None:
    """Until something listens there. Raises LayoutError when the time is up, or the host has no address."""
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


def _give_up(message: str) -> None:
    """From a thread, while the main one waits inside of jax."""
    os.write(2, f"error: {message}\n".encode())
    os._exit(2)


def check_processes(mesh: Mesh) -> None:
    """Raises LayoutError where a process of this program has no device in `mesh`: it would have nothing to do."""
    if {device.process_index for device in mesh.devices.flat} != set(range(jax.process_count())):
        raise LayoutError(
            f"the mesh has {mesh.size} devices and the {jax.process_count()} processes have {jax.device_count()}; "
            "choose a mesh of all of them, or start fewer processes"
        )


def broadcast_from_primary(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them: the others do not call it, and raise what it raised.

    All processes must call this at the same point of the program, as with anything that they do together. What is
    given must pickle.
    """
    if jax.process_count() == 1:
        return make()
    said = b""
    if jax.process_index() == 0:
        try:
            said = pickle.dumps((make(), None))
        except Exception as error:
            said = pickle.dumps((None, error))
    length = int(broadcast_one_to_all(np.int32(len(said))))
    # Each size is a program of its own.
    sent = np.zeros(1 << (length - 1).bit_length(), np.uint8)
    sent[: len(said)] = np.frombuffer(said, np.uint8)
    value, error = pickle.loads(np.asarray(broadcast_one_to_all(sent))[:length].tobytes())
    if error is not None:
        raise error
    return value


def broadcast_each_from_primary(items: Iterable[T]) -> Iterator[T]:
    """The first process's items, one by one as they are asked for, in all processes."""
    source = iter(items)
    while (item := broadcast_from_primary(lambda: next(source, None))) is not None:
        yield item


def is_primary_process() -> bool:
    """Whether this process writes what only one may write: process 0."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns in every process once all have reached it; at once where there is only one."""
    if jax.process_count() > 1:
        sync_global_devices(name)
