"""Clients that leave, too many of them, keys, signals: every accepted request ends, and the server goes on."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time

import pytest

from sphinx_jax.cli.main import run_command
from tests.instruments.serving import NANO, Server, serving, start, wait_ready

LONG = {"temperature": 2, "top_p": 1, "ignore_eos": True, "seed": 1}
"""An answer as long as the context."""

FEW_PROGRAMS = (*NANO, "--max-num-seqs", 1, "--max-model-len", 256)
"""For servers that answer nothing: they compile half of what the others do."""


def begin(server: Server, body: dict) -> http.client.HTTPConnection:
    """A request whose answer is not read."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    content = {"messages": [{"role": "user", "content": "hi"}], **LONG, **body}
    connection.request("POST", "/v1/chat/completions", json.dumps(content), {"Content-Type": "application/json"})
    return connection


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(server, stream):
    aborted = server.metric("sphinx_jax_request_success_total")
    connections = [begin(server, {"stream": stream}) for _ in range(4)]
    wait_for(lambda: server.metric("sphinx_jax_num_requests_running") == 4)
    generated = server.metric("sphinx_jax_generation_tokens_total")
    for connection in connections:
        connection.close()
    server.wait_until_idle(5)
    assert server.metric("sphinx_jax_num_requests_running") == 0
    assert server.metric("sphinx_jax_request_success_total") == aborted + 4
    # Long before the answers would have ended.
    assert server.metric("sphinx_jax_generation_tokens_total") - generated < 4 * 1500
    assert 'finished_reason="abort"' in server.get("/metrics").body.decode()


def test_two_hundred_that_leave_at_once_and_then_one_that_stays(server):
    def leave() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = begin(server, {"stream": bool(threading.get_ident() % 2)})
            connection.sock.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                connection.getresponse().read()
            connection.close()

    threads = [threading.Thread(target=leave) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_until_idle(10)
    began = time.monotonic()
    assert server.chat(max_tokens=2).status == 200
    assert time.monotonic() - began < 5


def test_a_full_queue_turns_others_away(server):
    connections = [begin(server, {}) for _ in range(16)]
    wait_for(lambda: server.metric("sphinx_jax_num_requests_open") == 16)
    refused = server.chat(max_tokens=1)
    assert (refused.status, refused.error["code"]) == (429, "server_overloaded")
    assert refused.headers["retry-after"] == "1"
    # Looking is always possible.
    assert server.get("/health").status == server.get("/v1/models").status == 200
    for connection in connections:
        connection.close()
    server.wait_until_idle()
    assert server.chat(max_tokens=1).status == 200
    assert 'reason="server_overloaded"' in server.get("/metrics").body.decode()


def test_a_reader_that_pauses_loses_nothing(server):
    expected = server.chat("hi", **LONG, max_tokens=600).json["choices"][0]["message"]["content"]
    connection = begin(server, {"stream": True, "max_tokens": 600})
    response = connection.getresponse()
    data = response.read(10)
    time.sleep(1)
    data += response.read()
    events = [json.loads(line[6:]) for line in data.decode().split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected


def test_nothing_that_was_said_is_logged(server):
    secret = "violet-submarine-74"
    server.chat(secret, max_tokens=2)
    server.chat([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{secret}"}}])
    log = server.log.read_text()
    assert "/v1/chat/completions 200" in log and "prompt" in log
    assert "violet" not in log


# Keys


@pytest.mark.slow
def test_a_key_guards_all_but_the_page_and_health(tmp_path):
    (tmp_path / "key").write_text("s3cret\n")
    with serving(tmp_path, *FEW_PROGRAMS, "--api-key-file", tmp_path / "key") as server:
        for path in ("/", "/health"):
            assert server.get(path).status == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/tokenizer_info", "/nope"):
            refused = server.get(path)
            assert (refused.status, refused.error["code"]) == (401, "invalid_api_key"), path
            assert refused.headers["www-authenticate"] == "Bearer"
        for value in ("Bearer wrong", "s3cret", "Basic s3cret", "Bearer", "Bearer s3cret2"):
            assert server.get("/v1/models", Authorization=value).status == 401
        for value in ("Bearer s3cret", "bearer  s3cret", "BEARER s3cret"):
            assert server.get("/v1/models", Authorization=value).status == 200
        # A large body with a wrong key is refused by name, not by a cut connection.
        assert server.post("/v1/chat/completions", b"x" * (8 << 20), Authorization="Bearer wrong").status == 401


# Starting and stopping


@pytest.mark.slow
def test_while_it_loads_it_says_so_and_it_drains(tmp_path):
    process, log = start(tmp_path, *NANO, "--drain-seconds", 1.5)
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        wait_for(lambda: "listening at" in log.read_text(), 60)
        url = log.read_text().partition("listening at ")[2].partition(",")[0]
        server = Server(process, url, log)
        health = server.get("/health")
        assert (health.status, health.json["status"]) == (503, "loading") and health.json["progress"]
        assert server.get("/").status == 200
        early = server.chat()
        assert (early.status, early.headers["retry-after"]) == (503, "5") and "loading" in early.error["message"]
        assert wait_ready(process, log) == url
        assert server.get("/health").json == {"status": "ready"}

        begun = begin(server, {"stream": True, "max_tokens": 30})
        endless = begin(server, {"stream": True})
        wait_for(lambda: server.metric("sphinx_jax_num_requests_running") == 2)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/health").json == {"status": "draining"})
        refused = server.chat()
        assert refused.status == 503 and "shuts down" in refused.error["message"]
        # What runs goes on, to its end if there is time.
        assert b"[DONE]" in begun.getresponse().read()
        cut = endless.getresponse().read()
        assert b'"error"' in cut and cut.endswith(b"data: [DONE]\n\n")
        assert process.wait(20) == 0


@pytest.mark.slow
def test_sigint_ends_an_idle_server_at_once(tmp_path):
    process, log = start(tmp_path, *FEW_PROGRAMS)
    wait_ready(process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def test_what_stops_a_server_from_starting(tmp_path, capsys):
    """One sentence and exit code 2, before weights are read."""
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        faults = {
            ("--port", taken.getsockname()[1]): "choose another --port",
            ("--port", 70000): "--port",
            ("--host", "no.such.host.invalid"): "cannot listen",
            ("--api-key-file", tmp_path / "none"): "cannot read",
            ("--api-key-file", tmp_path / "empty"): "without spaces",
            ("--api-key", "two words"): "without spaces",
            ("--temperature", -1): "temperature",
            ("--queue", -1): "--queue",
            ("--allowed-media-root", tmp_path / "none"): "no directory",
            ("--nope",): "--help",
        }
        for argv, reason in faults.items():
            assert run_command("serve", list(map(str, argv))) == 2
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert said.startswith("error: ") and reason in said, (argv, said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "reason"),
    [(("--checkpoint", "none"), "none"), (("--max-model-len", 10**8), "use a shorter --max-model-len")],
)
def test_a_model_that_cannot_be_served_ends_the_server(tmp_path, argv, reason):
    """In the thread that loads it: the server listens already."""
    process, log = start(tmp_path, *argv)
    assert process.wait(60) == 2
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ") and reason in last
