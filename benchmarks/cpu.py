"""Our Mixtral against that of transformers on torch: same weights, dtype, threads and lengths, in one process.

python benchmarks/cpu.py [--preset NAME] [--quick] [--json FILE]

Needs the parity extra, and some minutes. Repetitions of both sides alternate; a ratio is transformers' median time
over ours, with the faster of its two experts implementations, so above 1 we are faster. Prints a Markdown table, each
row as it is measured. On a machine with other load, `taskset -c 0` makes results more stable.
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
from functools import partial
from pathlib import Path

import numpy as np
from jobs import OurModel, machine, time_after_idle, training

from sphinx_jax import checkpoints
from sphinx_jax.cli.startup import keep_freed_memory, prepare_process
from sphinx_jax.config import preset

try:
    from peer import TransformersModel, torch
except ImportError:
    sys.exit("error: this benchmark compares with transformers on torch; run pip install -e '.[parity]'")

PRESETS = ("mixtral-140m", "nano")
"""Of `nano` the decoder alone, which transformers has too. It is so small that fixed costs, such as kernel launches,
dominate on either side."""

REPETITIONS = 3
"""Of each side, alternating, after one warm-up run of each."""


def compare(name: str, quick: bool) -> Iterator[dict]:
    """One row for each job."""
    config = dataclasses.replace(preset(name), vision=None)
    ours = OurModel(config, "float32")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights"
        checkpoints.save(path, config, ours.params, None, format="mixtral")
        theirs = TransformersModel.from_checkpoint(path)
    random = np.random.default_rng(0)

    def random_tokens(batch_size: int, length: int) -> np.ndarray:
        return random.integers(3, ours.vocab_size, (batch_size, length)).astype(np.int32)

    tokens = random_tokens(2, 16)
    difference = np.abs(ours.logits(tokens) - theirs.logits(tokens)).max()
    if difference > 1e-3:
        sys.exit(f"error: the logits of the two models differ by {difference:.1e}; nothing was timed")

    prompts, batch = {size: random_tokens(size, 512) for size in (1, 4)}, random_tokens(4, 256)
    # (label, our job, kind and argument of the job of transformers)
    jobs = [(f"prefill {n} x 512", partial(ours.prefill, prompts[n]), "prefill", prompts[n]) for n in prompts]
    jobs += [(f"decode, batch {n}", partial(ours.decode, n), "decode", n) for n in (1, 16)]
    # Last: it changes the weights.
    jobs += [("training step 4 x 256", partial(training, config, batch, "float32"), "train", batch)]
    for label, make_job, kind, argument in jobs:
        job = make_job()
        best, their_run = theirs.fastest(kind, argument)
        job.run()
        their_run()
        times = [(time_after_idle(job.run), time_after_idle(their_run)) for _ in range(1 if quick else REPETITIONS)]
        our_seconds, their_seconds = (statistics.median(side) for side in zip(*times, strict=True))
        yield {
            "preset": name,
            "job": label,
            "ratio": their_seconds / our_seconds,
            "tokens": job.tokens,
            "our_seconds": our_seconds,
            "their_seconds": their_seconds,
            "their_experts": best,
        }


def main() -> None:
    # As the entry points: ours and transformers' side both keep what they free.
    prepare_process()
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="only this preset")
    parser.add_argument("--quick", action="store_true", help="one repetition: a smoke test")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    names = ("jax", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{time.strftime('%Y-%m-%d')}, {versions}, {torch.get_num_threads()} threads, float32")
    print(f"{machine()}\n")
    print("| model | job | ours, tokens/s | transformers, tokens/s | their experts | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in [options.preset] if options.preset else PRESETS:
        for row in compare(name, options.quick):
            rows.append(row)
            ours, theirs = row["tokens"] / row["our_seconds"], row["tokens"] / row["their_seconds"]
            cells = (
                row["preset"],
                row["job"],
                f"{ours:,.0f}",
                f"{theirs:,.0f}",
                row["their_experts"],
                f"{row['ratio']:.2f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    if options.json:
        described = {"versions": versions, "machine": machine(), "rows": rows}
        options.json.write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
