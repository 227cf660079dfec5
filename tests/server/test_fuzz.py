"""Bodies made to break the server: each gets an answer below 500, in the shape of all errors, and soon."""

import collections
import http.client
import json
import os
import threading
import time

import pytest

from tests.instruments import client_packages
from tests.instruments.hostile_bodies import gif_of, hostile_bodies
from tests.instruments.serving import Server, data_url, image_part, text_part

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("SPHINX_JAX_HOSTILE_BODIES", "2000"))
"""10,000 take minutes; the seed is the same, so the first are always those of a longer run."""

CONNECTIONS = 4
SCHEMATHESIS = "schemathesis==4.32.5"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_every_answer_conforms_to_the_openapi_document(server, tmp_path):
    """Examples that schemathesis makes of the schemas, right and wrong: no 5xx, each status documented, each error an
    Error."""
    packages = client_packages.install(tmp_path / "packages", SCHEMATHESIS)
    program = ["-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--url", server.url, "--seed", "1"]
    program += ["--phases", "coverage,fuzzing", "--max-examples", "100", "--checks", CHECKS, "--no-color"]
    # It keeps its examples in the working directory. An answer may fill the context, beside all that the machine does.
    said = client_packages.run(packages, [*program, "--request-timeout", "300"], folder=tmp_path)
    assert "Tested: 10" in said, said
    still_answers(server)


def test_hostile_bodies(server):
    bodies = hostile_bodies(COUNT, seed=0)
    lock, faults = threading.Lock(), []
    statuses: collections.Counter[int] = collections.Counter()
    slowest = 0.0

    def work() -> None:
        nonlocal slowest
        connection = http.client.HTTPConnection(*server.address, timeout=30)
        while True:
            with lock:
                path, body = next(bodies, (None, b""))
            if path is None:
                return
            began = time.monotonic()
            try:
                status, answer = ask(connection, path, body)
                fault = fault_of(status, answer)
            except (OSError, http.client.HTTPException) as error:
                status, fault = 0, repr(error)
            with lock:
                slowest = max(slowest, time.monotonic() - began)
                statuses[status] += 1
                if fault:
                    faults.append((path, body[:2000], fault))

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{COUNT} bodies in {time.monotonic() - began:.0f} s, slowest {slowest:.2f} s, {dict(statuses)}")
    assert not faults, faults[:5]
    assert statuses.total() == COUNT and statuses[400] > COUNT / 2 and statuses[200] > COUNT / 50
    still_answers(server)


def test_large_images_hold_nothing_else_up(server):
    """A GIF of 300 bytes that claims 67 million pixels is decoded: many of them wait for each other only."""
    content = [image_part(data_url(gif_of(8191, 8191), "image/gif")), text_part("What is this?")]
    ended: list[int] = []
    threads = [
        threading.Thread(target=lambda: ended.append(server.chat(content, max_tokens=1).status)) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    while not ended:
        time.sleep(0.01)
    assert server.post("/tokenize", {"prompt": "hi"}).status == 200
    assert server.chat(max_tokens=1).status == 200
    assert len(ended) < len(threads)
    for thread in threads:
        thread.join()
    assert set(ended) == {200}
    still_answers(server)


def ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, bytes]:
    """The status and the whole answer, on a connection that is kept; on a new one if the server has closed it, as it
    does after some idle seconds."""
    try:
        return once(connection, path, body)
    except (http.client.RemoteDisconnected, ConnectionError):
        connection.close()
        return once(connection, path, body)


def once(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, bytes]:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


def fault_of(status: int, answer: bytes) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if status >= 500 or b"Traceback" in answer:
        return f"{status}: {answer[:300]!r}"
    if status == 200:
        return f"an error within a stream: {answer[-300:]!r}" if b'data: {"error"' in answer else None
    error = json.loads(answer)
    right = list(error) == ["error"] and list(error["error"]) == ["message", "type", "param", "code"]
    return None if right and error["error"]["message"] else f"{status}: no error object: {answer[:300]!r}"


def still_answers(server: Server) -> None:
    """Nothing is left over, and one request gets its answer in under a second."""
    server.wait_until_idle(20)
    began = time.monotonic()
    assert server.chat(max_tokens=2).status == 200
    assert time.monotonic() - began < 1
    assert " 500 " not in server.log.read_text()
