"""Trains `nano` from one seed on six layouts of devices, checks that the losses agree, and draws docs/curves.svg.

python docs/draw_curves.py

Takes twenty minutes on two CPU cores that have much else to do.
"""

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from sphinx_jax.training import plot

STEPS = 50
TOLERANCE = 1e-3
"""Largest relative difference of a loss from that on one device."""

ROOT = Path(__file__).parents[1]

LAYOUTS = {
    "one device": (1, {}),
    "data 8": (1, {"data": 8}),
    "fsdp 8": (1, {"fsdp": 8}),
    "tensor 4 × data 2": (1, {"tensor": 4, "data": 2}),
    "expert 4 × fsdp 2": (1, {"expert": 4, "fsdp": 2}),
    "2 processes of 4 devices: fsdp 2 × tensor 4": (2, {"fsdp": 2, "tensor": 4}),
}
"""Name -> number of processes, axes of the mesh."""

DIFFERENCE = "relative difference of the loss from one device's"


def main() -> None:
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (processes, axes)) in enumerate(LAYOUTS.items()):
            runs[name] = plot.read(train(Path(folder) / str(number), processes, axes))
            print(f"{name}: loss {runs[name]['loss'][-1][1]:.6f} after {STEPS} steps", flush=True)
    alone, *others = runs
    for name in others:
        pairs = zip(runs[name]["loss"], runs[alone]["loss"], strict=True)
        differences = [(step, abs(loss / single - 1)) for (step, loss), (_, single) in pairs]
        worst = max(difference for _, difference in differences)
        print(f"{name}: {worst:.1e} from {alone} at most")
        if worst > TOLERANCE:
            sys.exit(f"error: {name} learns something else than {alone}: {worst:.1e} is more than {TOLERANCE:g}")
        # Equal losses have no place on a logarithmic axis.
        runs[name][DIFFERENCE] = [(step, difference) for step, difference in differences if difference]
    Path(__file__).with_name("curves.svg").write_text(plot.draw(runs, ("loss", DIFFERENCE)))


def train(out: Path, processes: int, axes: dict[str, int]) -> Path:
    """One run in `out`, started as a user would start it."""
    argv = [sys.executable, str(ROOT / "train.py"), "--out", str(out), "--steps", str(STEPS), "--log-every", "1"]
    # Fewer pictures are held out, which nothing here looks at.
    argv += ["--validation-split"]
    devices = 1
    for axis, size in axes.items():
        argv += [f"--mesh.{axis}", str(size)]
        devices *= size
    argv += ["--simulate-devices", str(devices // processes)]
    flags = [[]]
    if processes > 1:
        joined = ["--coordinator", free_address(), "--num-processes", str(processes)]
        flags = [[*joined, "--process-id", str(i)] for i in range(processes)]
    started = [subprocess.Popen([*argv, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for more in flags]
    for process in started:
        _, said = process.communicate()
        if process.returncode:
            sys.exit(said.decode())
    return out


def free_address() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


if __name__ == "__main__":
    main()
