"""Train adapters on the full, the int8 and the int4 base, judge them alike, and draw docs/adapters.svg.

python docs/draw_adapters.py        (needs matplotlib)

The data is that of examples/own_labels.py; prints the accuracy on the images that were held out.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
OPTIONS = ("--stage", "lora", "--lora-rank", "16", "--lr", "1e-2", "--log-every", "1")
BASES = {"float32 base": (), "int8 base": ("--quantize", "int8"), "int4 base": ("--quantize", "int4")}


def main() -> None:
    # Text as text and a fixed salt: the file changes only where the curves do.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "adapters", "font.size": 9})
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        for name, quantize in BASES.items():
            out = Path(folder) / name.split()[0]
            example = [sys.executable, str(ROOT / "examples" / "own_labels.py"), f"{folder}/signs"]
            subprocess.run([*example, *OPTIONS, *quantize, "--out", str(out)], check=True, capture_output=True)
            losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            accuracy = json.loads((out / "summary.json").read_text())["held_out"]["accuracy"]
            print(f"{name}: loss {losses[-1]:.4f}, accuracy {accuracy:.1%}", flush=True)
            axes.semilogy(np.arange(1, len(losses) + 1), losses, label=f"{name}, {accuracy:.1%} of held-out images")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).with_name("adapters.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
