"""Many clients of all kinds for a while: every answer has one end, and the server is afterwards what it was before."""

import asyncio
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.instruments import soak
from tests.instruments.serving import serving


def in_thread(clients: Coroutine[Any, Any, soak.Seen]) -> soak.Seen:
    """Run them in an event loop of their own: playwright, of other tests, leaves one running in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, clients).result()


@pytest.mark.slow
def test_the_server_outlives_its_clients(tmp_path):
    with serving(tmp_path, *soak.ARGUMENTS, "--queue", 100) as server:
        warm = in_thread(soak.soak(server, 10, 60, seed=1))
        before = soak.Resident(server)
        seen = in_thread(soak.soak(server, 20, 60))
        server.wait_until_idle()
        after = soak.Resident(server)
        assert warm.problems + seen.problems == []
        assert min(seen.kinds.values()) > 5 and seen.statuses[200] > 50, seen
        assert after.compilations == before.compilations
        assert after.descriptors <= before.descriptors + 3
        assert after.mib < 1.1 * before.mib + 20
        began = time.monotonic()
        assert server.chat(max_tokens=2).status == 200
        # 0.04 s on an idle machine.
        assert time.monotonic() - began < 10
