"""The input pipeline alone, beside what the model consumes: examples a second, taken in turns in one run.

    python benchmarks/input_pipeline.py

Writes photographs (synthetic ones, 640 x 480 JPEG) and conversations, reads them by `train.py`'s own pipeline at
the preset's picture size and at the published one, and runs the preset's training step on one of its batches.
Then it computes what eight GPUs would consume: their peak times the share that is used, over the arithmetic of
one example of SPHINX-MoE (6 x parameters at work on a word x words, and the encoders' forward pass).
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
from sphinx_jax.training.optimizer import adamw
from sphinx_jax.training.program import normalise_images
from sphinx_jax.training.step import make_loss, make_train_step
from sphinx_jax.training.train_state import init_state
from sphinx_jax.training.trainer import shard_batch

PEAK_FLOPS, USED, TEXT_WORDS = 989e12, 0.4, 221
"""An H100's dense bfloat16 peak, a good share of it, and text beside 291 image words: 512 positions."""


def write_data(folder: Path, count: int) -> Path:
    records = []
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        said = [{"from": "human", "value": "What is in this picture?"}, {"from": "gpt", "value": "Noise. " * 30}]
        records.append({"image": f"{number}.jpg", "conversations": said})
    (folder / "records.json").write_text(json.dumps(records))
    entry = {"path": str(folder / "records.json"), "type": "image_text", "root": str(folder)}
    (folder / "data.yaml").write_text(json.dumps({"META": [entry]}))
    return folder / "data.yaml"


def pipeline(file: Path, config: SphinxConfig, workers: int, batch_size: int) -> Callable[[], dict[str, np.ndarray]]:
    options = YamlOptions(max_length=config.num_image_tokens + TEXT_WORDS, workers=workers)
    task = YamlData(file, config, None, SkippedRecords(0.0), options)
    batches = task.batches(batch_size, seed=0)
    return lambda: next(batches)


def consumer(config: SphinxConfig, batch: dict[str, np.ndarray]) -> Callable[[], object]:
    """A call of it is one training step on `batch`."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    graph, params = sharding.init_params(lambda rngs: SphinxMoE(config, rngs=rngs), 0, mesh)
    params = {"model": params, "aux_probe": {}}
    optimizer = adamw(lambda step: 1e-3)
    loss = make_loss(graph, config)
    shardings = sharding.shardings_of(params)
    step = jax.jit(make_train_step(lambda p, b: loss(p, normalise_images(b)), optimizer, shardings), donate_argnums=0)
    held = [init_state(params, optimizer, mesh)]
    placed = shard_batch({name: x for name, x in batch.items() if name != "examples"}, mesh)

    def run() -> None:
        with sharding.mesh_context(mesh):
            held[0], metrics = step(held[0], placed)
            metrics["loss"].block_until_ready()

    return run


def rate(call: Callable[[], object], times: int, batch_size: int, ahead: int = 0) -> float:
    # What was made ahead while something else ran is not the pipeline's rate.
    for _ in range(ahead):
        call()
    started = time.perf_counter()
    for _ in range(times):
        call()
    return times * batch_size / (time.perf_counter() - started)


def needed_by_eight_gpus() -> float:
    """Examples a second that 8 GPUs would consume of SPHINX-MoE with frozen encoders."""
    config = sphinx_moe()
    _, params = sharding.abstract_params(lambda rngs: SphinxMoE(config, rngs=rngs), sharding.make_mesh())
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    experts = sum(leaf.size for leaf in jax.tree.leaves(params["language"]["layers"]["ffn"]) if leaf.ndim > 3)
    language = config.language
    at_work = size(params["language"]) - experts * (1 - language.experts_per_token / language.num_experts)
    decoder = 6 * at_work * (config.num_image_tokens + TEXT_WORDS)
    # Each encoder's transformer or trunk works on 257 places, the Q-Former's own included.
    encoders = 2 * size(params["vision"]) * 257
    return 8 * PEAK_FLOPS * USED / (decoder + encoders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config, published = preset(arguments.preset), sphinx_moe()
    with tempfile.TemporaryDirectory() as folder:
        file = write_data(Path(folder), 200)
        alone = pipeline(file, config, arguments.workers, arguments.batch_size)
        large = pipeline(file, published, arguments.workers, 8)
        step = consumer(config, alone())
        step(), large()
        rates = {"pipeline": [], "model": [], "large": []}
        for _ in range(arguments.rounds):
            rates["pipeline"].append(rate(alone, 12, arguments.batch_size, 2 * arguments.workers + 1))
            rates["model"].append(rate(step, 3, arguments.batch_size))
            rates["large"].append(rate(large, 12, 8, 2 * arguments.workers + 1))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(p / m for p, m in zip(rates["pipeline"], rates["model"], strict=True))
    needed = needed_by_eight_gpus()
    size = f"{config.vision.image_size} px, {arguments.workers} workers"
    print(f"pipeline alone, {size}: {middle['pipeline']:.0f} examples/s")
    print(f"training step of {arguments.preset} on this CPU: {middle['model']:.0f} examples/s; ratio {ratio:.1f}")
    print(f"pipeline alone, {published.vision.image_size} px: {middle['large']:.0f} examples/s")
    print(f"8 H100 at {USED:.0%} of their peak would consume {needed:.0f} examples/s of 512 positions (computed)")


if __name__ == "__main__":
    main()
