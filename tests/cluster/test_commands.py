"""Two tasks of two devices each, under srun: they answer as one process does, and the first one alone speaks."""

import json
import operator
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sharding
import sphinx_jax
from sphinx_jax.cli import common, evaluate
from tests.cluster.test_faults import SECONDS
from tests.cluster.training import wait_until
from tests.instruments.adapters import save_base
from tests.instruments.serving import Server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NODES = ("127.0.0.2", "127.0.0.3")
MESH = ("--dtype", "float32", "--mesh.data", 2, "--mesh.tensor", 2)
SIZES = ("--max-num-seqs", 2, "--max-model-len", 64)


class Step:
    """A script that srun has started on two nodes. What either task says begins with its number."""

    def __init__(self, cluster, folder, script, *options):
        self._output, self._error = folder / f"{script}.output", folder / f"{script}.error"
        argv = ["srun", "--job-name", script, "--nodelist", ",".join(NODES), "--ntasks-per-node", 1, "--label"]
        argv += [sys.executable, "-u", ROOT / script, *MESH, "--simulate-devices", 2, *options]
        caches = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cluster.folder / "cache")}
        self.process = subprocess.Popen(
            list(map(str, argv)),
            env=cluster.environment | caches,
            stdout=self._output.open("w"),
            stderr=self._error.open("w"),
        )

    def said(self, task):
        """The lines of a task on its standard output."""
        return _lines(self._output, task)

    def errors(self, task):
        """The lines of a task on its standard error."""
        return _lines(self._error, task)

    def wait(self, seconds=240):
        """The exit code."""
        return self.process.wait(timeout=seconds)


def _lines(file, task):
    lines = file.read_text().splitlines()
    return [line.removeprefix(f"{task}: ") for line in lines if line.startswith(f"{task}: ")]


@pytest.fixture
def start(slurm_cluster, tmp_path):
    """Starts a script; its tasks are killed at the end."""
    steps = []

    def start(script, *options):
        steps.append(Step(slurm_cluster, tmp_path, script, *options))
        return steps[-1]

    yield start
    running = [step.process for step in steps if step.process.poll() is None]
    if running:
        slurm_cluster.command("scancel", "--signal", "KILL", "--user", "root")
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model of text."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(base):
    """The same model in this process, on one device."""
    return sphinx_jax.load(base, sharding.make_mesh(), "float32", max_model_len=64)


def pid_of(task, text):
    """The process of a task of SLURM in whose command line `text` is."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = (folder / "cmdline").read_text(), (folder / "environ").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if command.startswith(sys.executable) and text in command and f"SLURM_PROCID={task}" in variables:
            return int(folder.name)
    raise AssertionError(f"no process of task {task}")


def test_a_file_is_answered_although_one_task_gets_sigterm(start, base, alone, tmp_path):
    prompts = [f"{i} plus {i % 7}?" for i in range(5000)]
    lines = [json.dumps({"id": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts)]
    (questions := tmp_path / "questions.jsonl").write_text("".join(lines))
    (folder := tmp_path / "answers").mkdir()
    out = folder / "answers.jsonl"
    options = ("--checkpoint", base, *SIZES, "--batch", questions, "--out", out, "--max-new-tokens", 8)

    def answers():
        written = out.read_text().splitlines(keepends=True) if out.exists() else []
        return {line["id"]: line["answer"] for line in (json.loads(line) for line in written if line.endswith("\n"))}

    stopped = start("infer.py", *options)
    wait_until(lambda: answers() or stopped.process.poll() is not None)
    os.kill(pid_of(1, str(out)), signal.SIGTERM)
    killed = time.monotonic()
    assert stopped.wait(SECONDS) != 0
    wait_until(lambda: all("".join(stopped.errors(i)[-1:]).startswith("error: ") for i in range(2)), 20)
    assert time.monotonic() - killed < SECONDS
    assert stopped.said(0) == stopped.said(1) == []
    assert "process 1 of 2" in stopped.errors(1)[-1]
    assert re.search("start all processes again|again, with all its processes", stopped.errors(0)[-1])

    before = answers()
    count = max(before) + 5
    questions.write_text("".join(lines[:count]))
    resumed = start("infer.py", *options)
    assert resumed.wait() == 0, resumed.errors(0)
    remark = f"{count - len(before)} answered, {len(before)} answered before, 0 failed: {out}"
    assert remark in resumed.errors(0) and not any("answered" in line for line in resumed.errors(1))
    assert sorted(file.name for file in folder.iterdir()) == [out.name, f"{out.name}.run.json"]
    assert before.items() <= answers().items()
    assert answers() == dict(enumerate(alone.generate(prompts[:count], max_new_tokens=8)))


def test_evaluation(start, tmp_path):
    options = ("--checkpoint", sphinx_jax.SHIPPED, "--tasks", "easy_vqa", "--limit", 6, "--max-model-len", 256)
    options += ("--max-num-seqs", 2, "--out")
    step = start("evaluate.py", *options, tmp_path / "two")
    assert common.run(evaluate.main, [*map(str, (*MESH, *options)), str(tmp_path / "one")]) == 0
    assert step.wait() == 0, step.errors(0)
    assert any("easy_vqa" in line for line in step.said(0)) and step.said(1) == []

    def answers(out):
        lines = map(json.loads, (out / "easy_vqa.jsonl").read_text().splitlines())
        return sorted(lines, key=operator.itemgetter("n"))

    one, two = (tmp_path / name for name in ("one", "two"))
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
    results = [json.loads((out / "results.json").read_text())["tasks"]["easy_vqa"] for out in (one, two)]
    assert results[0] == results[1] and results[0]["count"] == 6
    for expected, line in zip(answers(one), answers(two), strict=True):
        assert line == expected | {"logprob": pytest.approx(expected["logprob"], abs=1e-4)}


def test_server_at_the_first_node(slurm_cluster, start, base, alone):
    """It ends with success after SIGTERM to both tasks."""
    step = start("serve.py", "--checkpoint", base, *SIZES, "--host", NODES[0], "--port", 0)
    wait_until(lambda: step.said(0) or step.process.poll() is not None)
    (ready,) = step.said(0)
    assert re.fullmatch(rf"ready: http://{NODES[0]}:\d+", ready), step.errors(0)
    server = Server(step.process, ready.removeprefix("ready: "), Path(os.devnull))
    answer = server.chat("5 plus 5?", max_tokens=8).json["choices"][0]["message"]["content"]
    assert [answer] == alone.generate(["5 plus 5?"], max_new_tokens=8)
    job = slurm_cluster.command("squeue", "--noheader", "--name", "serve.py", "--states", "RUNNING", "--format", "%A")
    slurm_cluster.command("scancel", "--signal", "TERM", job)
    assert step.wait(SECONDS) == 0, (step.errors(0), step.errors(1))
    assert step.said(1) == []
