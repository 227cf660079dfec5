"""The two hosts of these tests, on a machine where network namespaces are not permitted."""

import subprocess

import pytest

from tests.cluster import hosts
from tests.cluster.conftest import require

pytestmark = pytest.mark.cluster


def test_loopback_addresses_without_namespaces(monkeypatch, tmp_path):
    require("openssh-server openssh-client iproute2", *hosts.PROGRAMS)

    def refuse(*argv, check=True):
        if check:
            raise subprocess.CalledProcessError(2, argv, stderr="RTNETLINK answers: Operation not permitted\n")

    monkeypatch.setattr(hosts, "_ip", refuse)
    with hosts.two_hosts(tmp_path / "hosts") as found:
        assert found.refusal == "RTNETLINK answers: Operation not permitted"
        for host, address in ((found.first, "127.0.0.2"), (found.second, "127.0.0.3")):
            output = tmp_path / host.name
            assert found.ssh(host, "echo $SSH_CONNECTION", output).wait(timeout=30) == 0, output.read_text()
            assert output.read_text().split()[2] == address
