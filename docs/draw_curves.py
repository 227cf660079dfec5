"""Train `nano` from one seed on six meshes, check that the losses agree, and draw docs/curves.svg.

python docs/draw_curves.py        (needs matplotlib)

Takes about twenty minutes on two CPU cores.
"""

import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot

STEPS = 50
TOLERANCE = 1e-3
"""Largest relative difference of a loss from that of one device."""

ROOT = Path(__file__).parents[1]

MESHES = {
    "one device": (1, {}),
    "data 8": (1, {"data": 8}),
    "fsdp 8": (1, {"fsdp": 8}),
    "tensor 4 × data 2": (1, {"tensor": 4, "data": 2}),
    "expert 4 × fsdp 2": (1, {"expert": 4, "fsdp": 2}),
    "2 processes of 4 devices: fsdp 2 × tensor 4": (2, {"fsdp": 2, "tensor": 4}),
}
"""Name -> number of processes, mesh axes."""


def main() -> None:
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, (num_processes, axes)) in enumerate(MESHES.items()):
            run = train(Path(folder) / str(index), num_processes, axes)
            lines = (run / "metrics.jsonl").read_text().splitlines()
            losses[name] = np.array([json.loads(line)["loss"] for line in lines])
            print(f"{name}: loss {losses[name][-1]:.6f} after {STEPS} steps", flush=True)
    single = losses["one device"]
    differences = {name: np.abs(loss / single - 1) for name, loss in losses.items()}
    for name, difference in differences.items():
        if difference.max() > TOLERANCE:
            sys.exit(f"error: {name}: the loss differs by {difference.max():.1e}, more than {TOLERANCE:g}")
    draw(losses, differences)


def draw(losses: dict[str, np.ndarray], differences: dict[str, np.ndarray]) -> None:
    """Loss and its relative difference from one device by step, on logarithmic axes, into docs/curves.svg."""
    # Text as text and a fixed salt: the file changes only where the curves do.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "curves", "font.size": 9})
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    steps = np.arange(1, STEPS + 1)
    for name, loss in losses.items():
        upper.semilogy(steps, loss, label=name)
        # Equal losses have no position on a logarithmic axis.
        lower.semilogy(steps, np.where(differences[name] > 0, differences[name], np.nan), ".-")
    upper.set_ylabel("loss")
    upper.legend(frameon=False)
    lower.set_ylabel("relative difference of the loss\nfrom one device")
    lower.set_xlabel("step")
    figure.savefig(Path(__file__).with_name("curves.svg"), metadata={"Date": None})


def train(out: Path, num_processes: int, axes: dict[str, int]) -> Path:
    """One run in `out`, started as a user would start it."""
    argv = [sys.executable, str(ROOT / "train.py"), "--out", str(out), "--steps", str(STEPS), "--log-every", "1"]
    # A smaller held-out set: its result is not used.
    argv += ["--validation-split"]
    num_devices = 1
    for axis, size in axes.items():
        argv += [f"--mesh.{axis}", str(size)]
        num_devices *= size
    argv += ["--simulate-devices", str(num_devices // num_processes)]
    flags = [[]]
    if num_processes > 1:
        common = ["--coordinator", free_address(), "--num-processes", str(num_processes)]
        flags = [[*common, "--process-id", str(i)] for i in range(num_processes)]
    processes = [subprocess.Popen([*argv, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for more in flags]
    for process in processes:
        _, stderr = process.communicate()
        if process.returncode:
            sys.exit(stderr.decode())
    return out


def free_address() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


if __name__ == "__main__":
    main()
