"""Throughput of the input pipeline against that of the training step, in examples/s, alternating in one process.

    python benchmarks/input_pipeline.py

Writes synthetic images (640 x 480 JPEG) and conversations, reads them with the pipeline of `train.py` at the image
size of the preset and at the published one, and runs the training step of the preset on one of the batches. Then it
computes the consumption of eight GPUs: their FLOP/s at an assumed MFU over the FLOPs of one example of SPHINX-MoE
(6 x active parameters x tokens, and the forward pass of the encoders).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import sharding
from sphinx_jax.config import SphinxConfig, preset, sphinx_moe
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tasks import YamlData, YamlOptions
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig
from sphinx_jax.training.train_state import init_state
from sphinx_jax.training.trainer import initial_params, shard_batch

PEAK_FLOPS, MFU, TEXT_LEN = 989e12, 0.4, 221
"""Dense bfloat16 peak of an H100, a good MFU, and text tokens, with 291 image tokens 512."""


def write_data(folder: Path, count: int) -> Path:
    records = []
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": "human", "value": "What is in this image?"}, {"from": "gpt", "value": "Noise. " * 30}]
        records.append({"image": f"{number}.jpg", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    entry = {"path": str(folder / "records.json"), "type": "image_text", "root": str(folder)}
    (folder / "data.yaml").write_text(json.dumps({"META": [entry]}))
    return folder / "data.yaml"


def pipeline(file: Path, config: SphinxConfig, workers: int, batch_size: int) -> Callable[[], dict[str, np.ndarray]]:
    options = YamlOptions(max_length=config.num_image_tokens + TEXT_LEN, workers=workers)
    task = YamlData(file, config, None, SkippedRecords(0.0), options)
    batches = task.batches(batch_size, seed=0)
    return lambda: next(batches)


def consumer(config: SphinxConfig, batch: dict[str, np.ndarray]) -> Callable[[], object]:
    """One call is one training step on `batch`."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = train_program(config, TrainConfig(batch_size=len(batch["tokens"])), mesh)
    params = {name: initial_params(program, name) for name in program.params}
    states = [init_state(params, program.optimizer, mesh)]
    sharded = shard_batch({name: x for name, x in batch.items() if name != "examples"}, mesh)
    step = program.step.compile((states[0], sharded, {}), mesh)

    def run() -> None:
        states[0], metrics = step(states[0], sharded, {})
        metrics["loss"].block_until_ready()

    return run


def rate(call: Callable[[], object], times: int, batch_size: int, prefetched: int = 0) -> float:
    # First drain the batches that were prefetched while something else ran.
    for _ in range(prefetched):
        call()
    started = time.perf_counter()
    for _ in range(times):
        call()
    return times * batch_size / (time.perf_counter() - started)


def eight_gpus_rate() -> float:
    """Examples/s of SPHINX-MoE with frozen encoders on 8 GPUs, computed."""
    config = sphinx_moe()
    _, params = sharding.abstract_params(lambda rngs: SphinxMoE(config, rngs=rngs), sharding.make_mesh())
    language_size, vision_size = (sum(p.size for p in jax.tree.leaves(params[n])) for n in ("language", "vision"))
    experts = sum(leaf.size for leaf in jax.tree.leaves(params["language"]["layers"]["ffn"]) if leaf.ndim > 3)
    language = config.language
    active = language_size - experts * (1 - language.experts_per_token / language.num_experts)
    decoder = 6 * active * (config.num_image_tokens + TEXT_LEN)
    # Each encoder processes 257 tokens per crop, the vision transformer of the Q-Former included.
    encoders = 2 * vision_size * 257
    return 8 * PEAK_FLOPS * MFU / (decoder + encoders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config, published = preset(arguments.preset), sphinx_moe()
    assert config.vision and published.vision, "the preset must have vision encoders"
    with tempfile.TemporaryDirectory() as folder:
        file = write_data(Path(folder), 200)
        own_size = pipeline(file, config, arguments.workers, arguments.batch_size)
        published_size = pipeline(file, published, arguments.workers, 8)
        step = consumer(config, own_size())
        step()
        published_size()
        rates = {"pipeline": [], "model": [], "published": []}
        for _ in range(arguments.rounds):
            rates["pipeline"].append(rate(own_size, 12, arguments.batch_size, 2 * arguments.workers + 1))
            rates["model"].append(rate(step, 3, arguments.batch_size))
            rates["published"].append(rate(published_size, 12, 8, 2 * arguments.workers + 1))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(p / m for p, m in zip(rates["pipeline"], rates["model"], strict=True))
    needed = eight_gpus_rate()
    size = f"{config.vision.image_size} px, {arguments.workers} workers"
    print(f"pipeline, {size}: {medians['pipeline']:.0f} examples/s")
    print(f"training step of {arguments.preset} on this CPU: {medians['model']:.0f} examples/s; ratio {ratio:.1f}")
    print(f"pipeline, {published.vision.image_size} px: {medians['published']:.0f} examples/s")
    print(f"8 H100 at {MFU:.0%} MFU consume {needed:.0f} examples/s of 512 tokens (computed)")


if __name__ == "__main__":
    main()
