"""The same loss and gradients on every layout of eight devices, whichever way batch, weights and words are shared."""

import jax
import numpy as np
import pytest

import sharding
from sharding import DEFAULT_RULES, SEQUENCE_PARALLEL_RULES
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.step import make_loss

CONFIG = SphinxConfig(DecoderConfig(16, 16, 1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=64), None)
TOKENS = np.random.default_rng(0).integers(1, 64, (8, 20), np.int32)
"""Four devices divide the length of the sequences, eight do not."""

LAYOUTS = {
    "data 8": ({"data": 8}, DEFAULT_RULES),
    "fsdp 8": ({"fsdp": 8}, DEFAULT_RULES),
    "expert 4, fsdp 2": ({"expert": 4, "fsdp": 2}, DEFAULT_RULES),
    "residual": ({"tensor": 2, "expert": 2, "fsdp": 2}, SEQUENCE_PARALLEL_RULES),
    "residual, as far as it divides": ({"tensor": 4, "expert": 2}, SEQUENCE_PARALLEL_RULES),
}


def gradient(params, shape, rules):
    """Training loss and gradients of `params`."""
    mesh = sharding.make_mesh(**shape)
    graph, abstract = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), mesh, rules)
    placed = jax.device_put(params, sharding.shardings_of(abstract))
    batch = {"tokens": TOKENS, "labels": TOKENS}
    with sharding.mesh_context(mesh, rules):
        step = jax.jit(jax.value_and_grad(make_loss(graph, CONFIG), has_aux=True))
        (loss, _), grads = jax.device_get(step({"model": placed, "attributes": {}}, batch))
    return loss, grads


@pytest.fixture(scope="module")
def alone():
    mesh = sharding.make_mesh()
    params = jax.device_get(sharding.init_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), 0, mesh)[1])
    return params, gradient(params, {}, DEFAULT_RULES)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rules"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_learns_the_same(alone, shape, rules):
    params, (loss, grads) = alone
    ours, our_grads = gradient(params, shape, rules)
    np.testing.assert_allclose(ours, loss, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
    jax.tree.map(close, our_grads, grads)
