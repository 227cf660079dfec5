"""Write docs/fits.md: what fits where, compiled for cards that are not there. Takes about half an hour on two cores.

python docs/make_fits.py
"""

import dataclasses
import importlib.metadata
import sys
import time
from pathlib import Path

from sharding import MeshShape
from sphinx_jax.config import preset
from sphinx_jax.hardware import GPUS, find_gpu
from sphinx_jax.memory_plan.aot import has_gpu_compiler
from sphinx_jax.memory_plan.inference import inference_plan
from sphinx_jax.memory_plan.report import Plan
from sphinx_jax.memory_plan.training import training_batch, training_plan
from sphinx_jax.training.train_config import TrainConfig

CARD = "a100-80gb"
"""Compiled for once; what it takes is then held against every card's memory. Hopper's programs read longer pieces of a
prompt and take more to answer, for which such cards have room."""

ANSWERING = {
    "sphinx-moe-1k": (2, 4, 8, 16),
    "sphinx-moe": (2, 4, 8, 16),
    "mixtral-8x7b": (2, 4, 8, 16),
    "sphinx-mini": (1,),
    "sphinx-tiny": (1,),
    "mixtral-140m": (1,),
    "nano": (1,),
}
"""Numbers of cards for each preset."""

SMALLER = ({"quantize": "int8"}, {"quantize": "int4"}, {"offload": True}, {"offload": True, "quantize": "int4"})
"""Ways of answering with sphinx-moe-1k on one card."""

TRAINING = [
    ("sphinx-moe", MeshShape(tensor=8), 4, "bfloat16", "mm_stage2"),
    ("sphinx-moe", MeshShape(tensor=8, fsdp=2), 8, "float32", "mm_stage2"),
    ("sphinx-moe", MeshShape(tensor=8, fsdp=4), 16, "float32", "mm_stage2"),
    ("sphinx-tiny", MeshShape(), 2, "bfloat16", "mm_stage2"),
    ("sphinx-tiny", MeshShape(), 2, "float32", "mm_stage2"),
]
"""(preset, mesh, batch, moments, stage) of steps on 2,048 positions, in bfloat16, with every layer recomputed."""


def answering() -> list[Plan]:
    plans = []
    for name, counts in ANSWERING.items():
        for count in counts:
            shape = MeshShape(tensor=min(count, 8), expert=max(count // 8, 1))
            size = {"dtype": "bfloat16", "max_num_seqs": 1, "max_model_len": 4096}
            plans.append(inference_plan(name, preset(name), find_gpu(CARD), shape, **size))
            print(plans[-1].job, count, file=sys.stderr)
    return plans


def smaller() -> list[Plan]:
    plans = []
    for way in SMALLER:
        size = {"dtype": "bfloat16", "max_num_seqs": 1, "max_model_len": 4096}
        config, card = preset("sphinx-moe-1k"), find_gpu(CARD)
        plans.append(inference_plan("sphinx-moe-1k", config, card, MeshShape(), **size, **way))
        print(plans[-1].job, way, file=sys.stderr)
    return plans


def training() -> list[Plan]:
    plans = []
    for name, shape, batch, moments, stage in TRAINING:
        train_config = TrainConfig(
            steps=1000, batch_size=batch, stage=stage, dtype="bfloat16", remat="block", moments=moments
        )
        config = preset(name)
        shapes = training_batch(config, train_config, 2048)
        plans.append(training_plan(name, config, find_gpu(CARD), shape, train_config, shapes))
        print(plans[-1].job, shape.size, file=sys.stderr)
    return plans


def rows(plans: list[Plan], what: dict[int, str]) -> list[str]:
    """One line a plan: what it takes on each device, and the cards that have as much."""
    cards = sorted(GPUS.values(), key=lambda gpu: gpu.memory_mib)
    lines = []
    for i, plan in enumerate(plans):
        fits = [gpu.name for gpu in cards if dataclasses.replace(plan, gpu=gpu).fits]
        size = plan.sharded_map
        held = size["parameters_bytes"] + size["optimizer_bytes"] + size["kv_cache_bytes"] + size["inputs_bytes"]
        made = size["gradients_bytes"] + size["temporaries_bytes"]
        numbers = " | ".join(f"{value / 2**30:.2f}" for value in (held, made, size["total_bytes"]))
        lines.append(f"| {what[i]} | {plan.num_gpus} | {numbers} | {', '.join(fits) or 'none'} |")
    return lines


def main() -> None:
    if not has_gpu_compiler():
        sys.exit("error: needs jax's CUDA plugin to compile for cards that are not there: pip install -e '.[plan]'")
    asked, shrunk, trained = answering(), smaller(), training()
    head = f"| cards | held, GiB | made, GiB | total with reserve, GiB | fits on |\n|{' --- |' * 6}"
    names = {i: plan.job.partition(",")[0] for i, plan in enumerate(asked)}
    ways = {
        i: ", ".join(f"--{flag} {value}".removesuffix(" True") for flag, value in way.items())
        for i, way in enumerate(SMALLER)
    }
    steps = {i: plan.job for i, plan in enumerate(trained)}
    lines = [
        "# What fits where",
        "",
        f"Written by `python docs/make_fits.py`, {time.strftime('%Y-%m-%d')}, jax {importlib.metadata.version('jax')}. "
        "All figures are of one card. Held: weights, optimizer state, key/value cache, inputs. Made: gradients and "
        "what the program needs on the way. [planning.md](planning.md) says what is counted. Nothing here was run on "
        "a GPU.",
        "",
        "## Answering: bfloat16, not quantised, one answer of 4,096 positions, pictures included",
        "",
        f"| model {head}",
        *rows(asked, names),
        "",
        "## Answering with sphinx-moe-1k on one card ([memory.md](memory.md))",
        "",
        f"| how {head}",
        *rows(shrunk, ways),
        "",
        "## Training: one optimizer step, computing in bfloat16, float32 master weights, every layer recomputed",
        "",
        f"| step {head}",
        *rows(trained, steps),
        "",
    ]
    Path(__file__).with_name("fits.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
