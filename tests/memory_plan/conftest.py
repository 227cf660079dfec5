"""Plans of full-size models; each is compiled once a test run."""

import dataclasses
import functools

import pytest

from sharding import MeshShape
from sphinx_jax.config import preset
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import has_gpu_compiler
from sphinx_jax.memory_plan.inference import inference_plan
from sphinx_jax.memory_plan.training import training_batch, training_plan
from sphinx_jax.training.train_config import TrainConfig


@pytest.fixture(scope="session")
def needs_gpu_compiler():
    if not has_gpu_compiler():
        pytest.skip("needs jax's CUDA plugin, to compile for GPUs that are not there: pip install -e '.[plan]'")


@pytest.fixture(scope="session")
def inference(needs_gpu_compiler):
    """(model, card, mesh) -> the plan of one answer of 4,096 positions in bfloat16."""

    @functools.cache
    def compiled(model, card, axes):
        shape = MeshShape(**dict(axes))
        return inference_plan(
            model, preset(model), find_gpu(card), shape, dtype="bfloat16", max_num_seqs=1, max_model_len=4096
        )

    def plan(model, card, shape):
        # These take the same, to the byte; only the memory differs that they have to fit into.
        kind = "rtx3090" if find_gpu(card).compute_capability in ((8, 6), (8, 9)) else card
        return dataclasses.replace(compiled(model, kind, tuple(shape.items())), gpu=find_gpu(card))

    return plan


@pytest.fixture(scope="session")
def training(needs_gpu_compiler):
    """(card, mesh, batch, recipe) -> the plan of a step of SPHINX-MoE on 2,048 positions, encoders frozen."""

    @functools.cache
    def compiled(card, axes, batch, moments):
        train_config = TrainConfig(
            steps=1000, batch_size=batch, stage="mm_stage2", dtype="bfloat16", remat="block", moments=moments
        )
        config = preset("sphinx-moe")
        shapes = training_batch(config, train_config, 2048)
        return training_plan("sphinx-moe", config, find_gpu(card), MeshShape(**dict(axes)), train_config, shapes)

    return lambda card, shape, batch, moments="float32": compiled(card, tuple(shape.items()), batch, moments)
