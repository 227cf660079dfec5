"""A server as its users start it, in a process of its own, and requests to it over real sockets."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

import sphinx_jax

ROOT = Path(__file__).parents[2]

CONTEXT = 2048
NANO = ("--checkpoint", sphinx_jax.SHIPPED, "--max-num-seqs", 4, "--queue", 12, "--max-model-len", CONTEXT)
"""The same sizes in all tests: the programs of one server are those of the next."""


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream; [DONE] must be the last."""
        *events, done, end = self.body.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]

    @property
    def error(self) -> dict[str, Any]:
        """The error object, whose shape is checked."""
        (error,) = self.json.values()
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"] and "Traceback" not in error["message"]
        return error


class Server(NamedTuple):
    process: subprocess.Popen
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request; a body that is no bytes goes as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = ({"Content-Type": "application/json"} if data is not None else {}) | dict(headers or {})
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, data, given)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.request("POST", path, body, headers)

    def chat(self, content: Any = "What color is the shape?", **fields: Any) -> Answer:
        messages = content if isinstance(content, list) and "role" in content[0] else None
        return self.post(
            "/v1/chat/completions", {"messages": messages or [{"role": "user", "content": content}], **fields}
        )

    def metric(self, name: str) -> float:
        """A counter or gauge without labels, or the sum over its labels."""
        text = self.get("/metrics").body.decode()
        assert name.removesuffix("_total") in text, f"no metric {name}"
        lines = text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.split(" ")[0].partition("{")[0] == name)

    def wait_until_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.metric("sphinx_jax_num_requests_open"):
            assert time.monotonic() < deadline, "requests are still open"
            time.sleep(0.05)


@contextlib.contextmanager
def serving(folder: Path, *argv: object, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready, on a free port; its log is in `folder`. It is killed at the end."""
    process, log = start(folder, *argv, env=env)
    try:
        yield Server(process, wait_ready(process, log), log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def start(folder: Path, *argv: object, env: Mapping[str, str] | None = None) -> tuple[subprocess.Popen, Path]:
    """A server that has just been started, and the file of what it prints."""
    log = folder / "serve.log"
    # Below pytest's own folder, which all its processes share: what one server compiled the next one reads.
    shared = next(parent for parent in folder.parents if parent.name.startswith("pytest-of-"))
    cache = {"XDG_CACHE_HOME": str(shared / "serve-cache"), "JAX_PLATFORMS": "cpu"}
    with log.open("wb") as out:
        program = [sys.executable, ROOT / "serve.py", "--port", 0, *argv]
        process = subprocess.Popen(
            list(map(str, program)), stdout=out, stderr=out, env=os.environ | cache | dict(env or {}), cwd=folder
        )
    return process, log


def wait_ready(process: subprocess.Popen, log: Path, seconds: float = 600) -> str:
    """The address that a server prints once it is ready."""
    deadline = time.monotonic() + seconds
    while True:
        said = log.read_text()
        for line in said.splitlines():
            if line.startswith("ready: "):
                return line.removeprefix("ready: ")
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.1)


def png(pixels: np.ndarray) -> bytes:
    """Pixels uint8[height, width, 3] as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
