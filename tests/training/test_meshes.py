"""The same loss and gradients on every mesh of eight devices, however batch, parameters and sequence are sharded."""

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
"""Four devices divide the sequence length, eight do not."""

MESHES = {
    "data 8": ({"data": 8}, DEFAULT_RULES),
    "fsdp 8": ({"fsdp": 8}, DEFAULT_RULES),
    "expert 4, fsdp 2": ({"expert": 4, "fsdp": 2}, DEFAULT_RULES),
    "sequence parallel": ({"tensor": 2, "expert": 2, "fsdp": 2}, SEQUENCE_PARALLEL_RULES),
    "sequence parallel, not divisible": ({"tensor": 4, "expert": 2}, SEQUENCE_PARALLEL_RULES),
}


def gradient(params, shape, rules):
    """Training loss and gradients of `params`."""
    mesh = sharding.make_mesh(**shape)
    graph, abstract = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), mesh, rules)
    placed = jax.device_put(params, sharding.shardings_of(abstract))
    batch = {"tokens": TOKENS, "labels": TOKENS}
    with sharding.mesh_context(mesh, rules):
        step = jax.jit(jax.value_and_grad(make_loss(graph, CONFIG), has_aux=True))
        (loss, _), grads = jax.device_get(step({"model": placed}, batch))
    return loss, grads


@pytest.fixture(scope="module")
def single_device():
    mesh = sharding.make_mesh()
    params = jax.device_get(sharding.init_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), 0, mesh)[1])
    return params, gradient(params, {}, DEFAULT_RULES)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rules"), MESHES.values(), ids=MESHES)
def test_same_gradients_on_every_mesh(single_device, shape, rules):
    params, (loss, grads) = single_device
    mesh_loss, mesh_grads = gradient(params, shape, rules)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(mesh_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
