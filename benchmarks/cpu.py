"""Our Mixtral beside transformers' on torch: same weights, dtype, threads and lengths, one run, as ratios.

python benchmarks/cpu.py [--preset NAME] [--quick] [--json FILE]

Needs the parity extra, and some minutes. Repetitions of both sides alternate; a ratio is transformers' median time
over ours, with the faster of its two forms of the experts, so above 1 we are faster. Prints a Markdown table, each
row as it is measured. On a machine with other work, `taskset -c 0` before it leaves less to chance.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jobs import Ours, rested, training

from sphinx_jax import checkpoints
from sphinx_jax.config import preset

try:
    from peer import Theirs, torch
except ImportError:
    sys.exit("error: this benchmark compares with transformers on torch; run pip install -e '.[parity]'")

PRESETS = ("mixtral-140m", "nano")
"""Of `nano` the decoder, which is what transformers has too. Its work is so little that the parts which do not grow
with a model's size, launching kernels on either side, are most of it."""

REPETITIONS = 3
"""Of each side, in turn, after one of each to warm up."""


def compare(name: str, quick: bool) -> Iterator[dict]:
    """One row for each job."""
    config = dataclasses.replace(preset(name), vision=None)
    ours = Ours(config, "float32")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights"
        checkpoints.save(path, config, ours.params, None, format="mixtral")
        theirs = Theirs.of_files(path)
    random = np.random.default_rng(0)
    draw = lambda *shape: random.integers(3, ours.vocab, shape).astype(np.int32)
    tokens = draw(2, 16)
    difference = np.abs(ours.logits(tokens) - theirs.logits(tokens)).max()
    if difference > 1e-3:
        sys.exit(f"error: the two models differ by {difference:.1e} in their scores; nothing was timed")

    prompts, batch = {rows: draw(rows, 512) for rows in (1, 4)}, draw(4, 256)
    jobs = [
        (f"prefill {rows} x 512", lambda r=rows: ours.prefill(prompts[r]), "prefill", prompts[rows]) for rows in prompts
    ]
    jobs += [(f"decode, batch {rows}", lambda r=rows: ours.decode(r), "decode", rows) for rows in (1, 16)]
    # Last: it changes the weights.
    jobs += [("training step 4 x 256", lambda: training(config, batch, "float32"), "train", batch)]
    for label, make, kind, argument in jobs:
        own = make()
        best, other = theirs.fastest(kind, argument)
        own.run(), other()
        times = [(rested(own.run), rested(other)) for _ in range(1 if quick else REPETITIONS)]
        mine, peer = (statistics.median(side) for side in zip(*times, strict=True))
        found = {"preset": name, "job": label, "ratio": peer / mine, "tokens": own.tokens}
        yield found | {"ours_s": mine, "theirs_s": peer, "their_experts": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="measure this one alone")
    parser.add_argument("--quick", action="store_true", help="one repetition: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    names = ("jax", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{time.strftime('%Y-%m-%d')}, {versions}, {torch.get_num_threads()} threads, float32\n")
    print("| model | job | ours, tokens/s | transformers, tokens/s | their experts | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in [options.preset] if options.preset else PRESETS:
        for row in compare(name, options.quick):
            rows.append(row)
            mine, peer = row["tokens"] / row["ours_s"], row["tokens"] / row["theirs_s"]
            cells = (
                row["preset"],
                row["job"],
                f"{mine:,.0f}",
                f"{peer:,.0f}",
                row["their_experts"],
                f"{row['ratio']:.2f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
