"""The optimizer's state lies where its parameters do, and there is none for what does not learn."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import sharding
from sphinx_jax.training.optimizer import adamw, only
from sphinx_jax.training.train_state import abstract_state, init_state


@pytest.fixture(scope="module")
def state():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    put = lambda shape, *names: jax.device_put(jnp.ones(shape), sharding.named_sharding(names, shape, mesh))
    params = {
        "model": {"w": {"kernel": put((8, 16), "embed", "mlp")}, "frozen": {"kernel": put((8, 16), "embed", "mlp")}},
        "attributes": {},
    }
    flags = {"model": {"w": {"kernel": True}, "frozen": {"kernel": False}}, "attributes": {}}
    optimizer = only(adamw(lambda step: 0.1), flags)
    return abstract_state(params, optimizer, mesh), init_state(params, optimizer, mesh)


def test_moments_lie_where_their_parameters_do(state):
    for one in state:
        moments = [leaf for leaf in jax.tree.leaves(one.optimizer) if leaf.shape == (8, 16)]
        assert len(moments) == 2
        assert {leaf.sharding.spec for leaf in moments} == {P("fsdp", "tensor")}


def test_abstract_and_made_state_agree(state):
    abstract, made = state
    assert jax.tree.structure(abstract) == jax.tree.structure(made)
    for expected, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(made), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
