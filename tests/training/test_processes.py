"""Two processes of four devices each, started as a user would, train as one of eight does, and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from sphinx_jax.errors import UserError
from sphinx_jax.training import run_directory

MESH = ["--mesh.fsdp", "4", "--mesh.tensor", "2"]


def losses(out):
    file = out / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []


def test_several_processes_need_one_directory(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several processes need --out"):
        run_directory.choose(None, "nano")
    assert run_directory.choose(Path("one"), "nano") == Path("one")


@pytest.mark.slow
def test_two_processes(tmp_path):
    say = lambda i: [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": str(i * i)}]
    (tmp_path / "records.json").write_text(json.dumps([{"conversations": say(i)} for i in range(100)]))
    entry = {"path": str(tmp_path / "records.json"), "type": "text"}
    (tmp_path / "data.yaml").write_text(json.dumps({"META": [entry]}))
    argv = ["--preset", "tiny", "--data", str(tmp_path / "data.yaml"), "--max-length", "64", "--batch-size", "8"]
    argv += [*MESH, "--log-every", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    program = [sys.executable, str(Path(__file__).with_name("tiny.py")), *argv]
    alone = [*program, "--simulate-devices", "8", "--steps", "8", "--out", str(one)]
    subprocess.run(alone, env=environment, check=True, capture_output=True)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for i in range(2):
        run = [*program, "--simulate-devices", "4", "--steps", "5000", "--out", str(two)]
        run += ["--coordinator", address, "--num-processes", "2", "--process-id", str(i)]
        output = (tmp_path / f"said{i}").open("w")
        processes.append(subprocess.Popen(run, env=environment, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + 300
    while len(losses(two)) < 10:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=120) for process in processes]
    said = [(tmp_path / f"said{i}").read_text() for i in range(2)]
    assert codes == [0, 0], said
    assert "stopped by SIGTERM" in said[0] and "step 8 " in said[0] and "step 8 " not in said[1]
    # Both warm up alike, however long they are to be.
    assert losses(two)[:8] == pytest.approx(losses(one), rel=1e-3)
    (newest,) = [int(path.name) for path in (two / "checkpoints").iterdir()]
    assert newest == len(losses(two))
