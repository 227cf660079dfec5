"""`evaluate.py` as users start it: killed and continued, on a mesh, in two processes, it leaves the same answers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sphinx_jax
from tests.instruments.two_processes import in_two

EVALUATE = Path(__file__).parents[2] / "evaluate.py"
LIMIT = 1000
OPTIONS = ("--tasks", "easy_vqa", "--limit", LIMIT, "--max-num-seqs", 16, "--max-model-len", 256, "--dtype", "float32")


def command(out, *argv):
    return [*map(str, [sys.executable, EVALUATE, "--checkpoint", sphinx_jax.SHIPPED, *OPTIONS, "--out", out, *argv])]


def evaluated(out, *argv):
    """The last line of standard error of an evaluation that ends."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command(out, *argv), env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


def answers(out):
    """The lines by number. Devices add numbers in different orders: probabilities differ in their last digits."""
    lines = [json.loads(line) for line in (out / "easy_vqa.jsonl").read_text().splitlines()]
    assert len({line["n"] for line in lines}) == len(lines) == LIMIT
    return {line.pop("n"): {**line, "logprob": pytest.approx(line["logprob"], abs=1e-3)} for line in lines}


def result(out):
    return json.loads((out / "results.json").read_text())["tasks"]["easy_vqa"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    evaluated(out)
    assert result(out)["value"] > 99.5 and result(out)["count"] == LIMIT
    return out


@pytest.mark.slow
def test_killed_and_started_again(whole, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    file = tmp_path / "out" / "easy_vqa.jsonl"
    with subprocess.Popen(command(tmp_path / "out"), env=environment, stderr=subprocess.DEVNULL) as process:
        while not file.exists() or file.read_bytes().count(b"\n") < 100:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    before = file.read_bytes().count(b"\n")
    assert 100 <= before < LIMIT
    remark = evaluated(tmp_path / "out")
    assert f"{LIMIT - before:,} questions answered" in remark and f"{before:,} answered before" in remark
    assert answers(tmp_path / "out") == answers(whole) and result(tmp_path / "out") == result(whole)


@pytest.mark.slow
def test_on_four_devices(whole, tmp_path):
    evaluated(tmp_path / "out", "--simulate-devices", 4, "--mesh.data", 2, "--mesh.tensor", 2)
    assert answers(tmp_path / "out") == answers(whole) and result(tmp_path / "out") == result(whole)


@pytest.mark.slow
def test_in_two_processes(whole, tmp_path):
    said, codes = in_two(EVALUATE, *OPTIONS[:6], "--out", tmp_path / "out")
    assert codes == [0, 0], said
    assert "easy_vqa" in said[0][0] and said[1][0] == ""
    assert answers(tmp_path / "out") == answers(whole) and result(tmp_path / "out") == result(whole)
