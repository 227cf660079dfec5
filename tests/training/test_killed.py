"""Runs that are killed, preempted or diverge resume from their checkpoint bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphinx_jax import config
from sphinx_jax.cli import common, train
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tasks import YamlData, YamlOptions
from sphinx_jax.errors import UserError
from sphinx_jax.training import train_config

TINY = Path(__file__).with_name("tiny.py")


def write_data(folder):
    """Sums as text: a data.yaml and its records."""
    records = []
    for i in range(120):
        pair = [{"from": "human", "value": f"{i} plus {i % 7}?"}, {"from": "gpt", "value": str(i + i % 7)}]
        records.append({"id": str(i), "conversations": pair})
    (folder / "records.json").write_text(json.dumps(records))
    entry = {"path": str(folder / "records.json"), "type": "text"}
    (folder / "data.yaml").write_text(json.dumps({"META": [entry]}))
    return folder / "data.yaml"


class Program:
    """`tiny.py` on one data set, in subprocesses that share the compilation cache."""

    def __init__(self, folder):
        self.argv = [sys.executable, str(TINY), "--preset", "tiny", "--data", str(write_data(folder))]
        self.argv += ["--max-length", "100", "--batch-size", "2", "--log-every", "1", "--save-every", "5"]
        self.folder = folder
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.environment = os.environ | cache | {"JAX_PLATFORMS": "cpu"}

    def start(self, out, steps):
        argv = [
            *self.argv,
            "--steps",
            str(steps),
            "--out",
            str(out),
            *(["--resume"] if (out / "options.json").exists() else []),
        ]
        self.errors = self.folder / "stderr"
        with self.errors.open("w") as errors:
            return subprocess.Popen(argv, env=self.environment, stdout=subprocess.PIPE, stderr=errors, text=True)

    def finish(self, out, steps):
        """Run to the end; the losses and gradient norms of all steps."""
        process = self.start(out, steps)
        process.communicate(timeout=300)
        assert process.returncode == 0, self.errors.read_text()
        assert len(losses(out)) == steps
        return losses(out)

    def wait(self, process, condition, seconds=120):
        """Until `condition()` holds; the process must not exit before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def uninterrupted(self, steps):
        out = self.folder / f"whole-{steps}"
        return losses(out) if out.exists() else self.finish(out, steps)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def file_size(file):
    return file.stat().st_size if file.exists() else 0


def is_saving(out):
    """Whether a checkpoint is half written."""
    return any("tmp" in path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(tmp_path_factory.mktemp("program"))


@pytest.mark.parametrize(("kills", "steps"), [(2, 150), pytest.param(8, 200, marks=pytest.mark.slow)])
def test_resume_after_random_kills(program, tmp_path, kills, steps):
    """kill -9, every other time during a save; then SIGTERM, then to the end.

    On two cores twenty killed runs reached about step 90: with eight, machines four times as fast have steps left.
    """
    rng = random.Random(kills)
    out = tmp_path / "killed"
    during_save = 0
    for kill in range(kills):
        process = program.start(out, steps)
        log = out / "metrics.jsonl"
        before = file_size(log)
        program.wait(process, lambda log=log, before=before: file_size(log) > before)
        time.sleep(rng.uniform(0, 0.15))
        if kill % 2:
            program.wait(process, lambda: is_saving(out))
            time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.communicate()
        during_save += is_saving(out)
    assert during_save > 1 or kills < 8
    process = program.start(out, steps)
    before = file_size(log)
    program.wait(process, lambda: file_size(log) > before)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"--out {out} --resume" in stdout
    newest = max(int(path.name) for path in (out / "checkpoints").iterdir())
    assert newest == losses(out)[-1][0] < steps
    assert not (out / "summary.json").exists()
    assert program.finish(out, steps) == program.uninterrupted(steps)


@pytest.fixture
def tiny(monkeypatch):
    """The preset in this process; its config."""
    nano = config.nano()
    small = {"dim": 16, "hidden_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2}
    tiny = config.SphinxConfig(language=config.dataclasses.replace(nano.language, **small), vision=None)
    monkeypatch.setitem(config.PRESETS, "tiny", lambda: tiny)
    return tiny


def call(tmp_path, *argv):
    argv = ["--preset", "tiny", "--data", write_data(tmp_path), "--max-length", "100", "--batch-size", "4", *argv]
    return common.run(train.main, [*map(str, argv), "--out", str(tmp_path / "run")])


@pytest.mark.slow
def test_other_data_is_no_resume(tiny, tmp_path, capsys):
    """One answer has changed: the run says so, and stays as it is."""
    assert call(tmp_path, "--steps", 2, "--save-every", 1) == 0
    before = (tmp_path / "run" / "options.json").read_bytes()
    call_again = ["--preset", "tiny", "--data", tmp_path / "data.yaml", "--max-length", "100", "--batch-size", "4"]
    resume = [*map(str, call_again), "--out", str(tmp_path / "run"), "--resume", "--steps", "3"]
    records = (tmp_path / "records.json").read_text()
    (tmp_path / "records.json").write_text(records.replace("5 plus 5?", "5 plus 6?"))
    assert common.run(train.main, resume) == 2
    assert "the data has changed" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "run" / "options.json").read_bytes() == before
    (tmp_path / "records.json").write_text(records)
    assert common.run(train.main, resume) == 0


def test_nonfinite_loss_stops_the_run(tiny, tmp_path, capsys, monkeypatch):
    """At any step: here at one that is not logged, after an update that was far too large."""

    def diverging(*_):
        return lambda step: jnp.where(step == 6, 1e30, 1e-3)

    monkeypatch.setattr(train_config.optax, "warmup_cosine_decay_schedule", diverging)
    assert call(tmp_path, "--steps", 60, "--lr", "1e-3", "--save-every", 4, "--log-every", 50) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert message.startswith("error: ") and "at step 7" in message and report["step"] == 7
    assert not all(np.isfinite(float(report[name])) for name in ("loss", "grad_norm"))
    assert "checkpoints/4 with --resume" in message
    task = YamlData(tmp_path / "data.yaml", tiny, None, SkippedRecords(0.0), YamlOptions(max_length=100))
    batches = task.batches(4, seed=0)
    batch = [next(batches) for _ in range(7)][-1]
    assert report["examples"] == [task.name(i) for i in batch["examples"].tolist()]
    assert report["examples"][0] in message


def test_preserved_checkpoints(tiny, tmp_path, monkeypatch):
    """The newest two and the best one; each evaluation is logged with its step and followed by a save."""
    scores = iter([0.1, 0.7, 0.3, 0.2, 0.5])
    monkeypatch.setattr(YamlData, "evaluate", lambda *_: {"held_out": {"accuracy": next(scores)}})
    assert call(tmp_path, "--steps", 10, "--save-every", 3, "--eval-every", 2, "--log-every", 5) == 0
    out = tmp_path / "run"
    assert sorted(int(path.name) for path in (out / "checkpoints").iterdir()) == [4, 9, 10]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line.get("held_out", {}).get("accuracy") for line in lines} == {
        **{2: 0.1, 4: 0.7, 5: None, 6: 0.3, 8: 0.2, 10: 0.5}
    }
    assert json.loads((out / "summary.json").read_text())["held_out"] == {"accuracy": 0.5}


def test_profile_contains_the_given_steps(tiny, tmp_path):
    assert call(tmp_path, "--steps", 5, "--profile", "2:3") == 0
    (file,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    assert sorted(dict(event.stats)["step_num"] for event in events) == [2, 3]


def test_data_error_loses_no_steps(tiny, tmp_path, monkeypatch, capsys):
    """Too many records skipped after three steps: the state is saved, and resumes once the data is repaired."""
    repaired = YamlData.batches

    class Failing:
        def __init__(self, *sizes, **more):
            self.count, self.inner = 0, repaired(*sizes, **more)

        def __next__(self):
            self.count += 1
            if self.count > 3:
                raise UserError("too many")
            return next(self.inner)

        def get_state(self):
            return self.inner.get_state()

    monkeypatch.setattr(YamlData, "batches", lambda *sizes, **more: Failing(*sizes, **more))
    assert call(tmp_path, "--steps", 6, "--log-every", 1) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: too many"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    monkeypatch.setattr(YamlData, "batches", repaired)
    assert call(tmp_path, "--steps", 6, "--log-every", 1, "--resume") == 0
    resumed = losses(tmp_path / "run")
    assert call(tmp_path, "--steps", 6, "--log-every", 1, "--overwrite") == 0
    assert resumed == losses(tmp_path / "run") and len(resumed) == 6


@pytest.mark.slow
def test_factored_moments_resume(tmp_path, monkeypatch):
    """Sharded over a mesh, a run that lost its second half repeats it bit for bit."""
    wide = config.dataclasses.replace(config.nano().language, dim=128, hidden_dim=16, num_layers=1, num_experts=2)
    monkeypatch.setitem(config.PRESETS, "tiny", lambda: config.SphinxConfig(language=wide, vision=None))
    argv = ["--steps", 6, "--save-every", 3, "--log-every", 1, "--lr", "1e-2", "--moments", "factored"]
    argv += ["--mesh.fsdp", 2]
    assert call(tmp_path, *argv) == 0
    out = tmp_path / "run"
    uninterrupted = losses(out)
    (out / "checkpoints" / "6").rename(tmp_path / "lost")
    assert call(tmp_path, *argv, "--resume") == 0
    assert losses(out) == uninterrupted and len(uninterrupted) == 6


def test_saved_by_minutes(tiny, tmp_path):
    assert call(tmp_path, "--steps", 4, "--save-minutes", "1e-9", "--keep-last", 4) == 0
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [1, 2, 3, 4]
