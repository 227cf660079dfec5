"""Readers that leave at the very moment something else happens."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.server.bridge import Bridge
from sphinx_jax.server.streaming import Gone, unless_gone
from sphinx_jax.server.ticket import Ticket, deliveries

REQUEST = Request([1, 2], None, SamplingParams(max_new_tokens=4))


@pytest.mark.parametrize("leaves_at", range(8))
def test_news_do_not_keep_a_reader_that_leaves(leaves_at):
    """The news come in turn 5 of the event loop, and the reader leaves a few turns before, with them or after."""

    async def main():
        wake, left = asyncio.Event(), asyncio.Event()

        async def read():
            async for _ in deliveries([Ticket(REQUEST, 2, wake)], wake):
                pass

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        reading = asyncio.ensure_future(unless_gone(receive, read()))
        await asyncio.sleep(0.01)
        for turn in range(8):
            if turn == leaves_at:
                left.set()
            if turn == 5:
                wake.set()
            await asyncio.sleep(0)
        ended, _ = await asyncio.wait({reading}, timeout=2)
        assert ended, "the reader has left, and is waited for"
        assert isinstance(reading.exception(), Gone)

    asyncio.run(main())


def test_a_request_given_up_while_a_round_begins_is_not_lost():
    """The event loop gives it up between two looks of the engine's thread: it is heard, and cancelled a round later."""

    class Leaves(Ticket):
        looks = 0

        @property
        def gave_up(self):
            self.looks += 1
            return self.looks > 1

        @gave_up.setter
        def gave_up(self, value):
            pass

    rounds = []

    class Lockstep:
        def round(self, requests, gone):
            rounds.append((requests, gone))
            return ["sequence"] * len(requests), []

    async def main():
        ticket = Leaves(REQUEST, 2, asyncio.Event())
        bridge = Bridge(lambda report: cast(Any, None), None)
        served = cast(Any, SimpleNamespace(lockstep=Lockstep()))
        bridge._round(served, [ticket], [])
        bridge._round(served, [], [ticket])

    asyncio.run(main())
    assert rounds == [([REQUEST], []), ([], ["sequence"])]
