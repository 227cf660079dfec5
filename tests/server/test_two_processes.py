"""A server of two processes answers as one, and ends when one of them does."""

import json
import signal
import socket
import time

import pytest

import sharding
import sphinx_jax
from tests.instruments.serving import Server, image_part, start, text_part, wait_ready
from tests.server.test_faults import LONG, begin, wait_for

pytestmark = pytest.mark.slow

CONTEXT = 512
SMALL = ("--checkpoint", sphinx_jax.SHIPPED, "--max-num-seqs", 2, "--queue", 12, "--max-model-len", CONTEXT)
"""Half of NANO's programs: both processes compile all of them at every start."""

MESH = ("--dtype", "float32", "--mesh.data", 2, "--mesh.tensor", 2, "--simulate-devices", 2)
SECONDS = 30
"""Within which clients hear that a process is gone, and the others end."""


@pytest.fixture
def two(tmp_path):
    """A server whose first process listens, and the second process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for i in range(2):
        (folder := tmp_path / str(i)).mkdir()
        own = "--coordinator", address, "--num-processes", 2, "--process-id", i
        started.append(start(folder, *SMALL, *MESH, *own))
    (first, log), (second, _) = started
    try:
        yield Server(first, wait_ready(first, log), log), second, started[1][1]
    finally:
        for process, _ in started:
            process.kill()
            process.wait()


def listens(server):
    with socket.socket() as client:
        return client.connect_ex(server.address) == 0


def test_two_processes_serve_what_one_does_and_end_together(two, held_out):
    server, second, log = two
    model = sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=CONTEXT)
    for url, question, truth in held_out[:3]:
        assert server.chat([image_part(url), text_part(question)]).json["choices"][0]["message"]["content"] == truth
    sampled = {"temperature": 1.5, "top_p": 1, "seed": 7, "max_tokens": 12}
    (expected,) = model.complete(["Why?"], temperature=1.5, top_p=1.0, seed=7, max_new_tokens=12)
    assert server.chat("Why?", **sampled).json["choices"][0]["message"]["content"] == expected.text
    scored = {"prompt": "What color is it?", "max_tokens": 0, "echo": True, "logprobs": 1}
    values = server.post("/v1/completions", scored).json["choices"][0]["logprobs"]["token_logprobs"]
    tokens = model.tokenizer.encode("What color is it?", bos=True, eos=False)
    assert values[1:] == pytest.approx(model.engine.prompt_logprobs(tokens).logprobs, abs=1e-4)
    # One that leaves is cancelled in both processes, and the next is served.
    begin(server, {"stream": True}).close()
    server.wait_until_idle(10)
    assert server.chat("Why?", **sampled).json["choices"][0]["message"]["content"] == expected.text
    # Both end with the first, also if the signal comes to the second when the first waits for it alone.
    second.send_signal(signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: not listens(server))
    time.sleep(3)
    second.send_signal(signal.SIGTERM)
    second.send_signal(signal.SIGCONT)
    assert (server.process.wait(SECONDS), second.wait(SECONDS)) == (0, 0), log.read_text()


def test_when_one_process_is_killed_clients_are_told_and_the_other_ends(two):
    server, second, _ = two
    streaming = begin(server, {"stream": True, **LONG})
    response = streaming.getresponse()
    wait_for(lambda: server.metric("sphinx_jax_num_requests_running") == 1)
    second.kill()
    killed = time.monotonic()
    events = [line for line in response.read().decode().split("\n\n") if line.startswith("data: {")]
    assert "error" in json.loads(events[-1].removeprefix("data: "))
    assert server.process.wait(SECONDS) == 1
    assert time.monotonic() - killed < SECONDS
