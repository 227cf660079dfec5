"""Many clients at once, of all kinds, and what they and the server's process saw.

    python -m tests.instruments.soak --seconds 300 --clients 200

Clients take whole answers and streams, leave in the middle, read slowly, cut their requests, and send bodies that are
no request. Every image is another one.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import random
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

import sphinx_jax
from tests.instruments.serving import CONTEXT, Server, data_url, image_part, png, serving, text_part

ARGUMENTS = ("--checkpoint", sphinx_jax.SHIPPED, "--max-num-seqs", 4, "--max-model-len", CONTEXT)
QUESTIONS = ("What color is the shape?", "Is it a circle?", "What shape is this?", "Tell me about it.")
KINDS = ("whole", "stream", "stream", "leave", "slow", "cut", "malformed")
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
)


@dataclasses.dataclass
class Seen:
    """What clients saw. `problems` are answers that break the contract."""

    statuses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first_token: list[float] = dataclasses.field(default_factory=list)
    ends: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)


class Resident:
    """What a process holds."""

    def __init__(self, server: Server):
        process = Path("/proc", str(server.process.pid))
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        self.mib = int(status["VmRSS"].split()[0]) / 1024
        self.descriptors = len(list((process / "fd").iterdir()))
        self.compilations = server.metric("sphinx_jax_compilations")


async def soak(server: Server, seconds: float, clients: int, seed: int = 0) -> Seen:
    """`clients` at once for so long; all of them have ended when it returns."""
    seen, end = Seen(), time.monotonic() + seconds
    host = urlsplit(server.url)

    async def client(number: int) -> None:
        choose = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            kind = choose.choice(KINDS)
            seen.kinds[kind] += 1
            try:
                async with asyncio.timeout(120):
                    await _ask(host.hostname, host.port, kind, choose, seen)
            except TimeoutError:
                seen.problems.append(f"{kind}: no end after two minutes")
            except OSError as error:
                seen.problems.append(f"{kind}: {error}")

    await asyncio.gather(*map(client, range(clients)))
    return seen


async def _ask(host: str | None, port: int | None, kind: str, choose: random.Random, seen: Seen) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        body = _body(kind, choose)
        message = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
        if kind == "cut":
            writer.write(message[: choose.randrange(len(message))])
            await writer.drain()
            return
        writer.write(message)
        await writer.drain()
        began = time.monotonic()
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        seen.statuses[status] += 1
        if kind == "leave":
            await reader.read(choose.randrange(1, 200))
            return
        if status == 200 and kind != "whole":
            await reader.readuntil(b'"content":"')
            await reader.readuntil(b'"content":"')
            seen.first_token.append(time.monotonic() - began)
        data = b""
        while part := await reader.read(64 if kind == "slow" else 1 << 16):
            data += part
            if kind == "slow" and len(data) < 2000:
                await asyncio.sleep(0.02)
        _check(kind, status, data, seen)
    except asyncio.IncompleteReadError:
        if kind != "leave":
            seen.problems.append(f"{kind}: the answer was cut")
    finally:
        writer.close()


def _body(kind: str, choose: random.Random) -> bytes:
    pixels = np.full((16, 16, 3), [choose.randrange(256) for _ in range(3)], np.uint8)
    pixels[choose.randrange(16), choose.randrange(16)] = choose.randrange(256)
    parts = [text_part(choose.choice(QUESTIONS))]
    if choose.random() < 0.7:
        parts.insert(0, image_part(data_url(png(pixels))))
    request = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": choose.choice((2, 8, 40)),
        "temperature": choose.choice((0, 1)),
        "ignore_eos": choose.random() < 0.5,
        "stream": kind in ("stream", "slow", "leave"),
    }
    body = json.dumps(request).encode()
    if kind != "malformed":
        return body
    return choose.choice((body[: len(body) // 2], b"[" * 9999, b"\xff" * 99, body.replace(b"user", b"tool"), b"{}"))


def _check(kind: str, status: int, data: bytes, seen: Seen) -> None:
    """Every answer has exactly one end."""
    if status != 200:
        expected = {400} if kind == "malformed" else {429}
        if status not in expected or b'"error"' not in data:
            seen.problems.append(f"{kind}: status {status}, {data[-200:]!r}")
        return
    if kind == "malformed":
        seen.problems.append("malformed: it was answered")
    ends = data.count(b'"finish_reason":"')
    if ends != 1 or (kind != "whole" and data.count(b"data: [DONE]") != 1):
        seen.problems.append(f"{kind}: {ends} ends, {data[-200:]!r}")
    seen.ends["stop" if b'"finish_reason":"stop"' in data else "length"] += 1


def main() -> None:
    """Run it and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--queue", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pytest-of-soak-") as folder:
        (Path(folder) / "server").mkdir()
        with serving(Path(folder) / "server", *ARGUMENTS, "--queue", options.queue) as server:
            asyncio.run(soak(server, options.seconds / 5, options.clients, seed=1))
            before = Resident(server)
            seen = asyncio.run(soak(server, options.seconds, options.clients))
            server.wait_until_idle()
            after = Resident(server)
            began = time.monotonic()
            server.chat(max_tokens=2)
            alone = time.monotonic() - began
    waits = np.sort(seen.first_token)
    print(f"{sum(seen.kinds.values())} requests: {dict(seen.kinds)}")
    print(f"statuses {dict(seen.statuses)}, ends {dict(seen.ends)}, problems {len(seen.problems)} {seen.problems[:3]}")
    print(f"time to first token: p50 {np.quantile(waits, 0.5):.2f} s, p99 {np.quantile(waits, 0.99):.2f} s")
    print(f"memory {before.mib:.0f} -> {after.mib:.0f} MiB, descriptors {before.descriptors} -> {after.descriptors}")
    print(f"compilations {before.compilations:.0f} -> {after.compilations:.0f}; one request afterwards: {alone:.2f} s")


if __name__ == "__main__":
    main()
