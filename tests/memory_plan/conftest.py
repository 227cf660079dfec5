"""Plans of full-size models, each compiled once per test run."""

import dataclasses
import functools

import pytest

from sharding import MeshShape
from sphinx_jax.config import preset
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan import inference as inference_module
from sphinx_jax.memory_plan.aot import has_gpu_compiler
from sphinx_jax.memory_plan.inference import inference_plan
from sphinx_jax.memory_plan.jobs import compile_jobs
from sphinx_jax.memory_plan.training import training_batch, training_plan
from sphinx_jax.training.train_config import TrainConfig


@pytest.fixture(scope="session")
def needs_gpu_compiler():
    if not has_gpu_compiler():
        pytest.skip("needs jax's CUDA plugin to compile for absent GPUs: pip install -e '.[plan]'")


@pytest.fixture(scope="session")
def inference(needs_gpu_compiler):
    """(preset, GPU, mesh) -> the plan of one sequence of 4,096 tokens in bfloat16.

    Later chunks of a prompt are not compiled: they take as long, and lack the tokens of the first chunk's image.
    """

    def compile_others(jobs, mesh):
        return compile_jobs([job for job in jobs if job.name != "chunked prefill"], mesh)

    @functools.cache
    def compiled(model, gpu, axes):
        shape = MeshShape(**dict(axes))
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(inference_module, "compile_jobs", compile_others)
            return inference_plan(
                model, preset(model), find_gpu(gpu), shape, dtype="bfloat16", max_num_seqs=1, max_model_len=4096
            )

    def plan(model, gpu, shape):
        # GPUs of these compute capabilities need the same memory, to the byte; only their capacity differs.
        kind = "rtx3090" if find_gpu(gpu).compute_capability in ((8, 6), (8, 9)) else gpu
        return dataclasses.replace(compiled(model, kind, tuple(shape.items())), gpu=find_gpu(gpu))

    return plan


@pytest.fixture(scope="session")
def training(needs_gpu_compiler):
    """(GPU, mesh, batch size, moments) -> the plan of a step of SPHINX-MoE on 2,048 tokens, encoders frozen."""

    @functools.cache
    def compiled(gpu, axes, batch_size, moments):
        train_config = TrainConfig(
            steps=1000, batch_size=batch_size, stage="mm_stage2", dtype="bfloat16", remat="block", moments=moments
        )
        config = preset("sphinx-moe")
        shapes = training_batch(config, train_config, 2048)
        return training_plan("sphinx-moe", config, find_gpu(gpu), MeshShape(**dict(axes)), train_config, shapes)

    return lambda gpu, shape, batch_size, moments="float32": compiled(gpu, tuple(shape.items()), batch_size, moments)
