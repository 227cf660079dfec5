"""Write the weights of one of a run's checkpoints as a model that `infer.py --checkpoint` takes.

sphinx-jax export runs/mine best --step 800
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.cli import common
from sphinx_jax.training.export import choose_step, read_description, read_weights


@dataclasses.dataclass(frozen=True)
class Options:
    """Export one checkpoint of a run."""

    run: tyro.conf.Positional[Path]
    """The run's directory, the run finished or not."""
    destination: tyro.conf.Positional[Path]
    """Directory to write; it must not exist, or be empty."""
    step: int | None = None
    """Which checkpoint; the newest by default."""
    format: Literal["native", "accessory", "mixtral"] = "native"
    """What to write; mixtral is Hugging Face's layout of the language part."""
    shards: int | None = None
    """Number of files: of accessory 1 by default, of mixtral as many as make 5 GB each."""


def main(argv: Sequence[str]) -> int:
    """Parse and export; returns the exit code."""
    options = common.parse(Options, argv, "sphinx-jax export", __doc__)
    config, tokenizer_bytes = read_description(options.run)
    step = choose_step(options.run, options.step)
    weights = read_weights(options.run, step, config, sharding.make_mesh())
    checkpoints.save(options.destination, config, weights, tokenizer_bytes, options.format, options.shards)
    print(f"wrote the weights of step {step} to {options.destination}")
    return 0
