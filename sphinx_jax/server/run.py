"""Runs the server: listens at once, loads the model beside, drains on SIGTERM."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from sharding import exit_now
from sphinx_jax.errors import UserError
from sphinx_jax.server.app import make_app
from sphinx_jax.server.bridge import Bridge, Served
from sphinx_jax.server.settings import Settings

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long the engine's thread may take to end after the last request."""

CLOSE_SECONDS = 5
"""How long connections may take to close."""

MAX_HEADER_BYTES = 64 << 10

SWITCH_SECONDS = 0.0005
"""Python's interpreter lock goes to the thread that waits for it after so long, instead of 5 ms: the engine's thread
needs it a few times a round, while the event loop writes to every reader."""


def run_server(listener: socket.socket, settings: Settings, load: Callable[[Callable[[str], None]], Served]) -> int:
    """Serve on `listener` until a signal ends it; returns the exit code.

    `load(report)` makes the model in the thread that owns it from then on. Raises the UserError that it raises.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    return asyncio.run(_run(listener, settings, load))


class _Server(uvicorn.Server):
    """Signals begin to drain instead of closing connections."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler, called in the main thread."""
        self._on_signal()


async def _run(listener: socket.socket, settings: Settings, load: Callable[[Callable[[str], None]], Served]) -> int:
    bridge = Bridge(load, settings.queue)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            # The second one does not wait for anything.
            exit_now(128 + signal.SIGTERM)
        loop.call_soon_threadsafe(asked.set)

    config = uvicorn.Config(
        make_app(bridge, settings),
        # One parser and one event loop everywhere: others are chosen by what happens to be installed.
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    server = _Server(config, on_signal)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("listening at %s, the model is loading", url)
    serving = asyncio.ensure_future(server.serve([listener]))
    announcing = asyncio.ensure_future(_announce(bridge, url))
    await _first(serving, asyncio.ensure_future(asked.wait()), asyncio.ensure_future(bridge.has_ended.wait()))
    announcing.cancel()
    await _drain(bridge, settings.drain_seconds)
    server.should_exit = True
    await serving
    code = _code(bridge)
    if not bridge.stop(STOP_SECONDS) or code:
        # The thread is in a call of the device, or loads: nothing ends that but the end of the process. And after a
        # failure jax would wait at its exit for processes that are gone.
        logging.shutdown()
        exit_now(code, f"error: {bridge.failure}; start the server again, with all its processes" if code else "")
    return code


async def _announce(bridge: Bridge, url: str) -> None:
    await bridge.is_ready.wait()
    print(f"ready: {url}", flush=True)


async def _drain(bridge: Bridge, seconds: float) -> None:
    """Let what runs go on for `seconds`; then end it with an error."""
    bridge.drain()
    if bridge.num_open:
        log.info("draining: %d requests go on for at most %g s", bridge.num_open, seconds)
    try:
        async with asyncio.timeout(seconds):
            await bridge.is_idle.wait()
    except TimeoutError:
        bridge.cut_short("the server shuts down")


def _code(bridge: Bridge) -> int:
    """The exit code. Raises the UserError that ended loading."""
    if isinstance(bridge.failure, UserError):
        raise bridge.failure
    return 1 if bridge.failure is not None else 0


async def _first(*tasks: asyncio.Future) -> None:
    """Wait for one of them, and give the others but the first up."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[1:]:
        task.cancel()
