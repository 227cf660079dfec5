"""A short training run of a tiny decoder, for processes that a launcher starts."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TINY = Path(__file__).parents[1] / "training" / "tiny.py"


class Training:
    """`tiny.py` on one data set in `folder`, which all processes share. `argv` is its command without --out."""

    def __init__(self, folder: Path):
        pairs = [[{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": str(i * i)}] for i in range(100)]
        (folder / "records.json").write_text(json.dumps([{"conversations": pair} for pair in pairs]))
        entry = {"path": str(folder / "records.json"), "type": "text"}
        (folder / "data.yaml").write_text(json.dumps({"META": [entry]}))
        self.folder = folder
        self.environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        self.argv = [sys.executable, str(TINY), "--data", str(folder / "data.yaml"), "--preset", "tiny"]
        self.argv += ["--max-length", "64", "--batch-size", "12", "--log-every", "1", "--lr", "1e-2"]

    def mesh(self, num_processes: int, axis: str = "fsdp") -> list[str]:
        """The options of a mesh of `num_processes` × 2 devices."""
        return ["--simulate-devices", "2", f"--mesh.{axis}", str(num_processes), "--mesh.tensor", "2"]

    def shell(self, *options: object) -> str:
        """The command with more options, for a shell that does not have this process's environment."""
        names = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
        variables = [f"{name}={self.environment[name]}" for name in names]
        return shlex.join(["env", *variables, *self.argv, *map(str, options)])

    def start(self, num_processes: int, *options: object, folder: Path) -> list[subprocess.Popen]:
        """Processes by plain options; each one's outputs are in `folder`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        common = [*self.argv, *self.mesh(num_processes, "data"), "--coordinator", coordinator, *options]
        argv = list(map(str, [*common, "--num-processes", num_processes, "--process-id"]))
        return [
            subprocess.Popen(
                [*argv, str(i)],
                env=self.environment,
                stdout=(folder / f"output{i}").open("w"),
                stderr=(folder / f"error{i}").open("w"),
            )
            for i in range(num_processes)
        ]

    @contextlib.contextmanager
    def running(self, num_processes: int, *options: object, folder: Path) -> Iterator[list[subprocess.Popen]]:
        """Processes as `start` has them, which are killed at the end."""
        processes = self.start(num_processes, *options, folder=folder)
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def losses(out: Path) -> dict[int, float]:
    """The loss of each step that is logged. The last line may be incomplete, where there was no space left."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return {line["step"]: line["loss"] for line in (json.loads(line) for line in lines if line.endswith("\n"))}


def saved(out: Path) -> list[int]:
    """The steps whose checkpoints are complete."""
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdecimal())


def wait_until(is_so: Callable[[], object], seconds: float = 300) -> None:
    """Return once it is so. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
