"""Two processes of four devices, started as a user would, train as one of eight devices does and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sphinx_jax import checkpoints
from sphinx_jax.cli import common, train
from sphinx_jax.errors import UserError
from sphinx_jax.training import run_directory
from tests.training.test_lora import save_base

MESH = ["--mesh.fsdp", "4", "--mesh.tensor", "2"]


def losses(out):
    file = out / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []


def test_several_processes_need_a_common_directory(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several processes need --out"):
        run_directory.choose(None, "nano")
    assert run_directory.choose(Path("one"), "nano") == Path("one")


class Program:
    """`tiny.py` on one data set, as two processes of four devices."""

    def __init__(self, folder, *argv):
        pairs = [[{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": str(i * i)}] for i in range(100)]
        (folder / "records.json").write_text(json.dumps([{"conversations": pair} for pair in pairs]))
        entry = {"path": str(folder / "records.json"), "type": "text"}
        (folder / "data.yaml").write_text(json.dumps({"META": [entry]}))
        self.argv = [sys.executable, Path(__file__).with_name("tiny.py"), "--data", folder / "data.yaml"]
        self.argv += ["--max-length", "64", "--batch-size", "8", *MESH, "--log-every", "1", *argv]
        self.folder, self.environment = folder, os.environ | {"JAX_PLATFORMS": "cpu"}

    def start_two(self, *argv):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        processes = []
        for i in range(2):
            run = [*self.argv, "--simulate-devices", "4", *argv]
            run += ["--coordinator", address, "--num-processes", "2", "--process-id", str(i)]
            output = (self.folder / f"output{i}").open("w")
            processes.append(subprocess.Popen(run, env=self.environment, stdout=output, stderr=subprocess.STDOUT))
        return processes

    def outputs(self):
        return [(self.folder / f"output{i}").read_text() for i in range(2)]


@pytest.mark.slow
def test_two_processes(tmp_path):
    program, one, two = Program(tmp_path, "--preset", "tiny"), tmp_path / "one", tmp_path / "two"
    single = [*program.argv, "--simulate-devices", "8", "--steps", "8", "--out", one]
    subprocess.run(single, env=program.environment, check=True, capture_output=True)
    processes = program.start_two("--steps", "5000", "--out", two)
    deadline = time.monotonic() + 300
    while len(losses(two)) < 10:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=120) for process in processes]
    outputs = program.outputs()
    assert codes == [0, 0], outputs
    assert "stopped by SIGTERM" in outputs[0] and "step 8 " in outputs[0] and "step 8 " not in outputs[1]
    # The warm-up does not depend on the number of steps.
    assert losses(two)[:8] == pytest.approx(losses(one), rel=1e-3)
    (newest,) = [int(path.name) for path in (two / "checkpoints").iterdir()]
    assert newest == len(losses(two))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [(), ("--quantize", "int8")], ids=["full", "int8"])
def test_adapters_in_two_processes(tmp_path, quantize):
    """The same adapters as in one process; each process reads its shards of the base; one file of each adapter."""
    base, one, two = save_base(tmp_path / "base", seed=0), tmp_path / "one", tmp_path / "two"
    program = Program(tmp_path, "--init", base, "--stage", "lora", "--lora-rank", "3", "--steps", "4", *quantize)
    assert common.run(train.main, [*map(str, program.argv[2:]), "--out", str(one)]) == 0
    processes = program.start_two("--out", two)
    assert [process.wait(timeout=120) for process in processes] == [0, 0], program.outputs()
    assert losses(two) == pytest.approx(losses(one), rel=1e-3) and len(losses(two)) == 4
    assert (two / "lora.json").read_text() == (one / "lora.json").read_text()
    ours, theirs = (checkpoints.open(run).adapters[0].factors for run in (two, one))
    assert set(ours) == set(theirs) and any(np.abs(b).max() > 1e-5 for _, b in ours.values())
    for path, factors in ours.items():
        for factor, expected in zip(factors, theirs[path], strict=True):
            np.testing.assert_allclose(factor, expected, rtol=1e-3, atol=1e-6)
