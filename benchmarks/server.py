"""Tokens a second through the server against those of a file of questions: same weights, same requests, one run.

python benchmarks/server.py [--preset NAME] [--clients N] [--tokens N]

Clients stream, each asks the next question as soon as its answer has ended, and every answer has the same length.
Loading and compiling are left out on both sides, which take turns.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from jobs import save_synthetic

import sphinx_jax
from sphinx_jax import Sphinx
from sphinx_jax.cli.startup import prepare_process
from sphinx_jax.inference import generate
from sphinx_jax.inference.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
MAX_MODEL_LEN = 256


def questions(count: int) -> list[str]:
    """Different texts of about 20 tokens."""
    random = np.random.default_rng(0)
    return [" ".join(str(number) for number in random.integers(0, 999, 8)) for _ in range(count)]


def through_file(model: Sphinx, asked: list[str], clients: int, tokens: int) -> float:
    """Tokens a second of all questions at once."""
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    requests = [model.request(text, None, params) for text in asked]
    start = time.perf_counter()
    done = generate.run_all(model.engine, requests, clients)
    return sum(len(completion.tokens) for completion in done) / (time.perf_counter() - start)


async def through_server(url: str, asked: list[str], clients: int, tokens: int) -> tuple[float, list[float]]:
    """Tokens a second of so many clients that stream, and each answer's time to its first token."""
    address, waiting, waits = urlsplit(url), list(asked), []

    async def client() -> None:
        while waiting:
            waits.append(await stream(address.hostname, address.port, waiting.pop(), tokens))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return len(asked) * tokens / (time.perf_counter() - start), waits


async def stream(host: str | None, port: int | None, text: str, tokens: int) -> float:
    """One answer to its end; the time to its first token."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    began = time.perf_counter()
    writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + data)
    assert b" 200 " in await reader.readline()
    await reader.readuntil(b'"content":""')
    await reader.readuntil(b"data: ")
    first = time.perf_counter() - began
    rest = await reader.read()
    assert b'"finish_reason":"length"' in rest and b"[DONE]" in rest
    writer.close()
    return first


def serve(path: Path, clients: int) -> tuple[subprocess.Popen, str]:
    """A server that is ready, and its address."""
    program = [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--checkpoint", str(path)]
    program += ["--max-num-seqs", str(clients), "--max-model-len", str(MAX_MODEL_LEN)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready: "):
            return process, line.removeprefix("ready: ").strip()
    sys.exit("error: the server did not start")


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mixtral-140m")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    prepare_process()
    asked = questions(2 * options.clients)
    with tempfile.TemporaryDirectory() as directory:
        (path,) = save_synthetic(options.preset, Path(directory), ["native"])
        model = sphinx_jax.load(path, max_model_len=MAX_MODEL_LEN)
        process, url = serve(path, options.clients)
        rows, waits = [], []
        try:
            for warm in (True, False, False, False):
                file = through_file(model, asked, options.clients, options.tokens)
                server, first = asyncio.run(through_server(url, asked, options.clients, options.tokens))
                if not warm:
                    rows.append((file, server))
                    waits += first
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    print("| preset | clients | file, tokens/s | server, tokens/s | ratio | time to first token, p50 / p99 |")
    print("|---|---|---|---|---|---|")
    file, server = np.median(rows, axis=0)
    p50, p99 = np.quantile(waits, [0.5, 0.99])
    first = f"{p50:.2f} / {p99:.2f} s"
    print(f"| {options.preset} | {options.clients} | {file:.0f} | {server:.0f} | {server / file:.2f} | {first} |")


if __name__ == "__main__":
    main()
