"""Moments are sharded like their parameters, and frozen parameters have none."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import sharding
from sphinx_jax.training.optimizer import adamw, trainable_only
from sphinx_jax.training.train_state import abstract_state, init_state


@pytest.fixture(scope="module")
def state():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    ones = jax.device_put(jnp.ones((8, 16)), sharding.named_sharding(("embed", "mlp"), (8, 16), mesh))
    params = {"model": {"w": {"kernel": ones}, "frozen": {"kernel": ones}}, "aux_probe": {}}
    trainable = {"model": {"w": {"kernel": True}, "frozen": {"kernel": False}}, "aux_probe": {}}
    optimizer = trainable_only(adamw(lambda step: 0.1), trainable)
    return abstract_state(params, optimizer, mesh), init_state(params, optimizer, mesh)


def test_moments_are_sharded_like_their_parameters(state):
    for train_state in state:
        moments = [leaf for leaf in jax.tree.leaves(train_state.opt_state) if leaf.shape == (8, 16)]
        assert len(moments) == 2
        assert {leaf.sharding.spec for leaf in moments} == {P("fsdp", "tensor")}


def test_abstract_and_concrete_state_agree(state):
    abstract, concrete = state
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for expected, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
