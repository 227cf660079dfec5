"""What happens to a run of two processes when something breaks, and that it continues afterwards."""

import json
import shlex
import signal
import time

import pytest

from tests.cluster.training import losses, saved, wait_until
from tests.instruments.small_disk import small_disk

pytestmark = pytest.mark.cluster

SECONDS = 150
"""Within which every process ends: two minutes, as docs/multi-host.md says, and a margin for a machine with load."""

LONG = ("--steps", 100_000, "--save-every", 5)


@pytest.fixture
def started(training, tmp_path):
    """Two processes that train into `tmp_path`/run and have saved twice."""
    with training.running(2, *LONG, "--out", tmp_path / "run", folder=tmp_path) as processes:
        wait_until(lambda: any(process.poll() is not None for process in processes) or len(saved(tmp_path / "run")) > 1)
        assert [process.poll() for process in processes] == [None, None], last_words(tmp_path)
        yield processes


def last_words(folder):
    return [(folder / f"error{i}").read_text().splitlines()[-1:] for i in range(2)]


def check_end(processes, folder, seconds=SECONDS):
    """All end in time, none with success, each with one sentence as its last word."""
    deadline = time.monotonic() + seconds
    codes = [process.wait(timeout=max(deadline - time.monotonic(), 0.1)) for process in processes]
    assert 0 not in codes
    # The shell that speaks for a process outlives it by a moment.
    wait_until(lambda: all(said and said[0].startswith("error: ") for said in last_words(folder)), 20)


def check_resumed(training, out, folder, num_processes):
    """The run continues from its newest checkpoint, on another number of hosts, and repeats the steps after it."""
    before, newest = losses(out), saved(out)[-1]
    steps = newest + 3
    (resumed := folder / "resumed").mkdir()
    processes = training.start(num_processes, "--steps", steps, "--out", out, "--resume", folder=resumed)
    codes = [process.wait(timeout=240) for process in processes]
    assert codes == [0] * num_processes, [file.read_text() for file in resumed.iterdir()]
    after = losses(out)
    assert list(after) == list(range(1, steps + 1)) and saved(out)[-1] == steps
    kept = range(1, newest + 1)
    assert [after[step] for step in kept] == [before[step] for step in kept]
    repeated = [step for step in before if newest < step <= steps]
    assert [after[step] for step in repeated] == pytest.approx([before[step] for step in repeated], rel=1e-4)
    assert json.loads((out / "summary.json").read_text())["mesh"]["data"] == num_processes


@pytest.mark.slow
def test_killed_and_resumed_on_one_host(training, started, tmp_path):
    started[1].kill()
    check_end(started, tmp_path)
    check_resumed(training, tmp_path / "run", tmp_path, 1)


@pytest.mark.slow
def test_coordinator_killed(started, tmp_path):
    started[0].kill()
    check_end(started, tmp_path)
    assert all(said[0].endswith("start all processes again, train.py with --resume") for said in last_words(tmp_path))


@pytest.mark.slow
def test_directory_that_cannot_be_written(training, tmp_path):
    with small_disk(tmp_path / "shared", "64m") as shared:
        out = shared / "run"
        with training.running(2, *LONG, "--out", out, folder=tmp_path) as processes:
            wait_until(lambda: len(saved(out)) > 1)
            deadline = time.monotonic() + SECONDS
            with (shared / "filler").open("wb", buffering=0) as filler:
                while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
                    # Again and again: an old checkpoint that is deleted makes room for the next.
                    with pytest.raises(OSError, match="No space left"):
                        while filler.write(bytes(4096)):
                            pass
                    time.sleep(0.05)
            check_end(processes, tmp_path)
            # The first process that notices says so; the other may hear of its end first.
            said = [words[0] for words in last_words(tmp_path)]
            assert any("No space left" in word and str(out) in word for word in said), said
            (shared / "filler").unlink()
            check_resumed(training, out, tmp_path, 1)


SCRIPT = """#!/bin/bash
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append
OUT={out}
srun --label {command} --out $OUT "$@" $(test -f $OUT/options.json && echo --resume)
"""


@pytest.mark.slow
def test_requeue_and_scancel_under_slurm(slurm_cluster, training, tmp_path):
    """The same script continues: started again by SLURM, and submitted again by its user with more nodes."""
    out, log, script = tmp_path / "run", tmp_path / "log", tmp_path / "job.sh"
    environment = slurm_cluster.environment | training.environment
    slurm_cluster.environment.update(environment)

    def submit(nodes, *options):
        command = [*training.argv, *training.mesh(nodes, "data")]
        script.write_text(SCRIPT.format(out=out, command=shlex.join(command)))
        return slurm_cluster.command("sbatch", "--parsable", "-N", nodes, "-o", log, script, *options)

    job = submit(2, *LONG)
    wait_until(lambda: len(losses(out)) > 5)
    slurm_cluster.command("scontrol", "requeue", job)
    slurm_cluster.wait_for(job, "PENDING", seconds=SECONDS)
    assert "stopped by SIGTERM" in log.read_text()
    requeued = saved(out)[-1]
    assert requeued == max(losses(out))

    wait_until(lambda: max(losses(out)) > requeued + 2)
    slurm_cluster.command("scancel", job)
    slurm_cluster.wait_for(job, "CANCELLED", seconds=SECONDS)
    wait_until(lambda: log.read_text().count("stopped by SIGTERM") == 2, SECONDS)
    cancelled = saved(out)[-1]
    assert cancelled == max(losses(out)) > requeued

    job = submit(3, "--steps", cancelled + 3)
    slurm_cluster.wait_for(job, "COMPLETED", seconds=300)
    assert list(losses(out)) == list(range(1, cancelled + 4))
    assert json.loads((out / "summary.json").read_text())["mesh"]["data"] == 3


@pytest.mark.slow
def test_paused_and_cut_off(ssh_hosts, training, tmp_path):
    """A host that stops for 30 seconds is waited for; one whose link is down ends, and so does the other."""
    if ssh_hosts.refusal:
        pytest.skip(f"needs network namespaces, which are not permitted: {ssh_hosts.refusal}")
    out, both = tmp_path / "run", (ssh_hosts.first, ssh_hosts.second)
    options = [*training.mesh(2, "data"), *LONG, "--out", out, "--coordinator", f"{both[0].name}:29500"]
    for i, host in enumerate(both):
        command = training.shell(*options, "--num-processes", 2, "--process-id", i)
        # Into a file of the host: what ssh passes on is cut off too.
        ssh_hosts.ssh(host, f"({command}) > {tmp_path}/output{i} 2> {tmp_path}/error{i}", tmp_path / f"ssh{i}")
    wait_until(lambda: len(saved(out)) > 1)

    ssh_hosts.kill(both[1], signal.SIGSTOP)
    time.sleep(30)
    paused_at = max(losses(out))
    ssh_hosts.kill(both[1], signal.SIGCONT)
    wait_until(lambda: max(losses(out)) > paused_at + 10, 60)

    ssh_hosts.cut(both[1])
    cut = time.monotonic()
    wait_until(lambda: all(said and said[0].startswith("error: ") for said in last_words(tmp_path)), SECONDS)
    wait_until(lambda: not any(ssh_hosts.pids(host, "tiny.py") for host in both), SECONDS - (time.monotonic() - cut))
