"""Write docs/fits.md: plans of all presets, compiled for absent GPUs. Takes about half an hour on two cores.

python docs/make_fits.py
"""

import dataclasses
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import NamedTuple

from sharding import MeshShape
from sphinx_jax.allocator import MEMORY_FRACTION
from sphinx_jax.config import preset
from sphinx_jax.hardware import GPUS, find_gpu
from sphinx_jax.kernels.quantized import QuantizedDtype
from sphinx_jax.memory_plan.aot import has_gpu_compiler
from sphinx_jax.memory_plan.inference import inference_plan
from sphinx_jax.memory_plan.report import Plan
from sphinx_jax.memory_plan.training import training_batch, training_plan
from sphinx_jax.training.moments import Moments
from sphinx_jax.training.train_config import TrainConfig

GPU = "a100-80gb"
"""Programs are compiled once, for this GPU; their memory is then compared with the capacity of every GPU. Programs for
Hopper have longer prefill chunks and need more memory, for which these GPUs have room."""

MAX_MODEL_LEN, MAX_LENGTH = 4096, 2048
"""Tokens of a sequence in inference and in training."""

INFERENCE = {
    "sphinx-moe-1k": (2, 4, 8, 16),
    "sphinx-moe": (2, 4, 8, 16),
    "mixtral-8x7b": (2, 4, 8, 16),
    "sphinx-mini": (1,),
    "sphinx-tiny": (1,),
    "mixtral-140m": (1,),
    "nano": (1,),
}
"""Preset -> numbers of GPUs."""


class Option(NamedTuple):
    """A way to fit sphinx-moe-1k into one GPU."""

    flags: str
    quantize: QuantizedDtype | None = None
    offload: bool = False


ONE_GPU = (
    Option("--quantize int8", quantize="int8"),
    Option("--quantize int4", quantize="int4"),
    Option("--offload", offload=True),
    Option("--offload --quantize int4", quantize="int4", offload=True),
)


class Step(NamedTuple):
    """A training step of --stage mm_stage2 with every layer rematerialised."""

    preset: str
    mesh: MeshShape
    batch_size: int
    moments: Moments


TRAINING = (
    Step("sphinx-moe", MeshShape(tensor=8), 4, "bfloat16"),
    Step("sphinx-moe", MeshShape(tensor=8), 4, "float32"),
    Step("sphinx-moe", MeshShape(tensor=8, fsdp=2), 8, "float32"),
    Step("sphinx-moe", MeshShape(tensor=8, fsdp=4), 16, "float32"),
    Step("sphinx-tiny", MeshShape(), 2, "bfloat16"),
    Step("sphinx-tiny", MeshShape(), 2, "float32"),
)


def plan_inference(name: str, mesh: MeshShape, option: Option | None = None) -> Plan:
    """One sequence of MAX_MODEL_LEN tokens in bfloat16."""
    plan = inference_plan(
        name,
        preset(name),
        find_gpu(GPU),
        mesh,
        dtype="bfloat16",
        quantize=option.quantize if option else None,
        offload=option.offload if option else False,
        max_num_seqs=1,
        max_model_len=MAX_MODEL_LEN,
    )
    print(plan.job, mesh.size, file=sys.stderr)
    return plan


def plan_training(step: Step) -> Plan:
    """One optimizer step on sequences of MAX_LENGTH tokens."""
    config = preset(step.preset)
    train_config = TrainConfig(
        batch_size=step.batch_size, stage="mm_stage2", dtype="bfloat16", remat="block", moments=step.moments
    )
    shapes = training_batch(config, train_config, MAX_LENGTH)
    plan = training_plan(step.preset, config, find_gpu(GPU), step.mesh, train_config, shapes)
    print(plan.job, step.mesh.size, file=sys.stderr)
    return plan


def table(first_column: str, plans: dict[str, list[Plan]]) -> list[str]:
    """One row per plan, named by its key: memory per device, and the GPUs that have as much."""
    gpus = sorted(GPUS.values(), key=lambda gpu: gpu.memory_mib)
    columns = (first_column, "GPUs", "persistent, GiB", "temporary, GiB", "total with reserve, GiB", "fits on")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for name, plan in ((name, plan) for name, group in plans.items() for plan in group):
        fits = [gpu.name for gpu in gpus if dataclasses.replace(plan, gpu=gpu).fits]
        size = plan.per_device
        persistent = size["parameters_bytes"] + size["optimizer_bytes"] + size["kv_cache_bytes"] + size["inputs_bytes"]
        temporary = size["gradients_bytes"] + size["temporaries_bytes"]
        sizes = " | ".join(f"{value / 2**30:.2f}" for value in (persistent, temporary, size["total_bytes"]))
        lines.append(f"| {name} | {plan.num_gpus} | {sizes} | {', '.join(fits) or 'none'} |")
    return lines


def main() -> None:
    if not has_gpu_compiler():
        sys.exit("error: needs jax's CUDA plugin to compile for absent GPUs: pip install -e '.[plan]'")
    inference = {
        name: [plan_inference(name, MeshShape(tensor=min(n, 8), expert=max(n // 8, 1))) for n in num_gpus]
        for name, num_gpus in INFERENCE.items()
    }
    one_gpu = {option.flags: [plan_inference("sphinx-moe-1k", MeshShape(), option)] for option in ONE_GPU}
    training: dict[str, list[Plan]] = {}
    for step in TRAINING:
        plan = plan_training(step)
        training.setdefault(plan.job, []).append(plan)
    lines = [
        "# What fits where",
        "",
        f"Written by `python docs/make_fits.py`, {time.strftime('%Y-%m-%d')}, jax {importlib.metadata.version('jax')}. "
        "All sizes are per GPU. Persistent: parameters, optimizer state, KV cache, inputs. Temporary: gradients and "
        "temporaries of the programs. A GPU fits if the total is within its capacity, what XLA can allocate there: "
        f"{MEMORY_FRACTION:.2f} of the memory that CUDA reports, 14.6 GiB of 16 and 72.9 of 80. "
        "[Memory planning](memory-planning.md) describes what is counted. Nothing here was run on a GPU.",
        "",
        f"## Inference: bfloat16, not quantized, one sequence of {MAX_MODEL_LEN:,} tokens, image included",
        "",
        *table("model", inference),
        "",
        "## Inference with sphinx-moe-1k on one GPU ([quantization and offload](quantization-and-offload.md))",
        "",
        *table("options", one_gpu),
        "",
        "## Training: one optimizer step, compute in bfloat16, float32 master weights, every layer rematerialised",
        "",
        *table("step", training),
        "",
    ]
    Path(__file__).with_name("fits.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
