"""Many clients of all kinds for a while: every answer has one end, and the server is afterwards what it was before."""

import asyncio
import time

import pytest

from tests.instruments import soak
from tests.instruments.serving import serving


@pytest.mark.slow
def test_the_server_outlives_its_clients(tmp_path):
    with serving(tmp_path, *soak.ARGUMENTS, "--queue", 100) as server:
        warm = asyncio.run(soak.soak(server, 10, 60, seed=1))
        before = soak.Resident(server)
        seen = asyncio.run(soak.soak(server, 20, 60))
        server.wait_until_idle()
        after = soak.Resident(server)
        assert warm.problems + seen.problems == []
        assert min(seen.kinds.values()) > 5 and seen.statuses[200] > 50, seen
        assert after.compilations == before.compilations
        assert after.descriptors <= before.descriptors + 3
        assert after.mib < 1.1 * before.mib + 20
        began = time.monotonic()
        assert server.chat(max_tokens=2).status == 200
        assert time.monotonic() - began < 1
