"""The names of the model's parts are in compiled programs, so that a profile reads like the model."""

import re

import jax
import jax.numpy as jnp
import pytest

import sharding
from sphinx_jax.config import (
    ClipConfig,
    ConvNextConfig,
    DecoderConfig,
    DinoConfig,
    QFormerConfig,
    SphinxConfig,
    VisionConfig,
)
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.language.kv_cache import make_cache
from sphinx_jax.model import SphinxMoE, bind

pytestmark = pytest.mark.optimized

CONFIG = SphinxConfig(
    DecoderConfig(dim=16, hidden_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=2, vocab_size=32),
    VisionConfig(
        image_size=16,
        clip=ClipConfig(width=8, num_layers=1, num_heads=1, patch=8, image_size=16),
        convnext=ConvNextConfig(depths=(1,), dims=(8,), kernel=3, image_size=8),
        dino=DinoConfig(width=8, num_layers=1, num_heads=1, patch=8, image_size=16, position_grid=3),
        qformer=QFormerConfig(
            vision_width=8, vision_layers=1, vision_heads=1, vision_mlp=8, patch=8, image_size=16,
            width=8, num_layers=1, num_heads=1, mlp=8, num_queries=2, cross_attention_every=1,
        ),
    ),
)  # fmt: skip

DECODER = {"decoder_layer", "attention", "moe", "router", "experts", "embedding", "lm_head"}
VISION = {"clip", "convnext", "dinov2", "qformer", "eva_vit", "vision_projection"}


def scopes(compiled: jax.stages.Compiled) -> list[set[str]]:
    """The scopes of each operation, such as {"jvp", "decoder_layer", "moe", "router"}."""
    return [set(re.findall(r"\w+", name)) for name in re.findall(r'op_name="([^"]*)"', compiled.as_text())]


@pytest.fixture(scope="module")
def training():
    graph, params = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), sharding.make_mesh())
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def loss(params, tokens, images):
        return jax.nn.logsumexp(bind(graph, params)(tokens, images, remat="block")[0])

    return scopes(jax.jit(jax.grad(loss)).lower(params, tokens, images).compile())


@pytest.mark.slow
@pytest.mark.parametrize("scope", sorted(DECODER | VISION))
def test_training(training, scope):
    """Every part has operations of the forward and of the backward pass."""
    named = [operation for operation in training if scope in operation]
    assert any("transpose" in operation for operation in named)
    assert any("transpose" not in operation for operation in named)


def test_decode():
    graph, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), sharding.make_mesh()
    )

    def decode(params, cache, tokens, positions):
        language = bind(graph, params).language
        hidden, cache, _ = language(language.embedding(tokens), positions, Causal(positions[:, 0]), cache)
        return language.logits(hidden), cache

    cache = jax.eval_shape(lambda: make_cache(CONFIG.language, 2, 8, jnp.float32))
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    operations = scopes(jax.jit(decode).lower(params, cache, tokens, tokens).compile())
    assert set().union(*operations) >= DECODER
    # Scopes are nested as the modules are.
    assert any({"decoder_layer", "moe", "experts"} <= operation for operation in operations)
