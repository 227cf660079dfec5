"""A tiny model with random weights, and a tokenizer trained on a few lines: no file is needed."""

import functools

import jax
import numpy as np
import pytest

import sharding
from sphinx_jax.checkpoints.loaded_model import Loaded
from sphinx_jax.config import ClipConfig, DecoderConfig, SphinxConfig, VisionConfig
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.tokenizer import train_tokenizer
from sphinx_jax.model import SphinxMoE
from sphinx_jax.sphinx import Sphinx

CONFIG = SphinxConfig(
    language=DecoderConfig(
        dim=32, hidden_dim=48, num_layers=2, num_heads=8, num_kv_heads=4, num_experts=4, vocab_size=512
    ),
    vision=VisionConfig(
        image_size=32,
        clip=ClipConfig(width=16, num_layers=1, num_heads=2, patch=16, image_size=32),
        convnext=None,
        dino=None,
        qformer=None,
    ),
)

QUESTIONS = ["what is the colour of the shape?", "is there a circle?", "is it red or is it blue?"]
"""What the tokenizer is trained on."""


@functools.cache
def tokenizer_bytes() -> bytes:
    lines = [Conversation.from_pairs([(question, "a red circle")]).text() for question in QUESTIONS]
    return train_tokenizer(lines, 500)


def tiny_model(max_model_len: int = 512, **mesh_shape: int) -> Sphinx:
    return random_model(CONFIG, max_model_len, **mesh_shape)


def random_model(config: SphinxConfig, max_model_len: int, **mesh_shape: int) -> Sphinx:
    mesh = sharding.make_mesh(**mesh_shape)
    graph, abstract = sharding.abstract_params(lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), mesh)
    random = np.random.default_rng(0)

    # Drawn by numpy: the program that draws them on the device takes longer to compile than these tests to run.
    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = random.normal(size=leaf.shape).astype(np.float32)
        values = 1 + 0.1 * values if path[-1].key == "scale" else values / np.sqrt(leaf.shape[0])
        return jax.device_put(values, leaf.sharding)

    params = jax.tree_util.tree_map_with_path(draw, abstract)
    return Sphinx(Loaded(config, graph, params, tokenizer_bytes(), mesh), max_model_len)


@pytest.fixture(scope="module")
def make_model():
    """make_model(max_model_len=512, **mesh_shape): the same weights on any mesh, made once for all tests of a file."""
    return functools.cache(tiny_model)


@pytest.fixture(scope="module")
def model(make_model) -> Sphinx:
    return make_model()


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32))
