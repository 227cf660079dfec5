"""Two hosts on this machine: network namespaces with addresses and host names of their own, and an sshd in each.

Where namespaces are not permitted the hosts are loopback addresses, whose link cannot be cut.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "ip", "unshare")

_SSH_CONFIG = """
Host *
    User root
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
Host {first}
    HostName {first_address}
    Port {port}
Host {second}
    HostName {second_address}
    Port {port}
"""

_SSHD_CONFIG = """
ListenAddress {address}
Port {port}
HostKey {folder}/key
PidFile {folder}/sshd-{address}.pid
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""


@dataclass(frozen=True)
class Host:
    """One host: its address, and with namespaces its name and the outer end of its link."""

    name: str
    address: str
    link: str | None


class Hosts:
    """Two hosts that `ssh` reaches. `refusal` says why they are not namespaces, or is empty."""

    def __init__(self, folder: Path, hosts: tuple[Host, Host], refusal: str):
        self.folder, self.refusal = folder, refusal
        self.first, self.second = hosts
        self._clients: list[subprocess.Popen] = []

    def ssh(self, host: Host, command: str, output: Path) -> subprocess.Popen:
        """Start a shell command on a host; what it says goes to a file."""
        argv = ["ssh", "-n", "-F", str(self.folder / "ssh_config"), host.name, command]
        self._clients.append(subprocess.Popen(argv, stdout=output.open("w"), stderr=subprocess.STDOUT))
        return self._clients[-1]

    def end_clients(self) -> None:
        """End what `ssh` started: a client whose host is cut off waits for hours."""
        for client in self._clients:
            client.kill()
            client.wait()

    def pids(self, host: Host, program: str) -> list[int]:
        """The processes on a host, a namespace, whose command line has `program`."""
        listed = subprocess.run(["ip", "netns", "pids", host.name], check=True, capture_output=True, text=True).stdout
        commands = {int(pid): Path("/proc", pid, "cmdline") for pid in listed.split()}
        return [pid for pid, command in commands.items() if command.exists() and program in command.read_text()]

    def kill(self, host: Host, number: signal.Signals) -> None:
        """Send a signal to all that runs on a host."""
        for pid in self.pids(host, ""):
            os.kill(pid, number)

    def cut(self, host: Host) -> None:
        """Take the host's link down."""
        assert host.link
        _ip("link", "set", host.link, "down")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """The hosts, with their files in `folder`; they end with the context."""
    with contextlib.ExitStack() as stack:
        try:
            hosts, refusal = stack.enter_context(_namespaces()), ""
        except subprocess.CalledProcessError as error:
            refusal = error.stderr.strip()
            hosts = Host("sphinx-a", "127.0.0.2", None), Host("sphinx-b", "127.0.0.3", None)
        stack.enter_context(_ssh_servers(folder, hosts))
        found = Hosts(folder, hosts, refusal)
        try:
            yield found
        finally:
            found.end_clients()
            if not refusal:
                for host in hosts:
                    found.kill(host, signal.SIGKILL)


@contextlib.contextmanager
def _namespaces() -> Iterator[tuple[Host, Host]]:
    """Two namespaces on one bridge. Raises CalledProcessError where they are not permitted."""
    tag = os.getpid()
    network = f"10.{200 + tag // 250 % 50}.{tag % 250}"
    hosts = tuple(Host(f"sphinx-{side}-{tag}", f"{network}.{i}", f"sx{side}{tag}") for i, side in ((2, "a"), (3, "b")))
    bridge = f"sx{tag}"
    names = "".join(f"{host.address} {host.name}\n" for host in hosts) + "127.0.0.1 localhost\n"
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in hosts:
            (etc := Path("/etc/netns", host.name)).mkdir(parents=True)
            (etc / "hosts").write_text(names)
            _ip("netns", "add", host.name)
            inside = ("netns", "exec", host.name, "ip")
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.link, "master", bridge, "up")
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
        first, second = hosts
        yield first, second
    finally:
        for host in hosts:
            _ip("netns", "del", host.name, check=False)
            _ip("link", "del", host.link, check=False)
            shutil.rmtree(Path("/etc/netns", host.name), ignore_errors=True)
        _ip("link", "del", bridge, check=False)


@contextlib.contextmanager
def _ssh_servers(folder: Path, hosts: tuple[Host, Host]) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    port = _free_port()
    first, second = hosts
    (folder / "ssh_config").write_text(
        _SSH_CONFIG.format(
            folder=folder,
            port=port,
            first=first.name,
            first_address=first.address,
            second=second.name,
            second_address=second.address,
        )
    )
    servers = []
    try:
        for host in hosts:
            config = folder / f"sshd-{host.name}"
            config.write_text(_SSHD_CONFIG.format(folder=folder, address=host.address, port=port))
            argv = [shutil.which("sshd"), "-D", "-e", "-f", str(config)]
            if host.link:
                named = f'hostname {host.name}; exec "$@"'
                argv = ["ip", "netns", "exec", host.name, "unshare", "--uts", "sh", "-c", named, "sh", *argv]
            servers.append(subprocess.Popen(argv, stderr=config.with_suffix(".log").open("w")))
        for host in hosts:
            _wait_for_port(host.address, port)
        yield
    finally:
        for server in servers:
            server.terminate()
            server.wait(timeout=30)


def _ip(*argv: str | None, check: bool = True) -> None:
    subprocess.run(["ip", *map(str, argv)], check=check, capture_output=True, text=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _wait_for_port(address: str, port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at {address}:{port}"
            time.sleep(0.1)
