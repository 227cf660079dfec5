"""Sharded initialisation: the same values on every mesh, and 1/N of the parameters per device."""

import math

import jax
import numpy as np
import pytest

import sharding
from sphinx_jax.config import DecoderConfig, mixtral_8x7b
from sphinx_jax.language.decoder import Decoder

CONFIG = DecoderConfig(dim=64, hidden_dim=96, num_layers=2, num_heads=16, num_kv_heads=8, num_experts=4, vocab_size=128)


def make(rngs):
    return Decoder(CONFIG, rngs=rngs)


def test_values_do_not_depend_on_the_mesh(mesh):
    _, one = sharding.init_params(make, 7, sharding.make_mesh())
    _, many = sharding.init_params(make, 7, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, many)


def test_bytes_per_device(mesh):
    _, params = sharding.init_params(make, 0, mesh)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    num_shards = mesh.size // mesh.shape["data"]
    for device in mesh.devices.flat:
        held = sum(
            s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards if s.device == device
        )
        # Norm scales and the router, a few hundred values here, are replicated.
        assert total / num_shards <= held <= total / num_shards + 4 * (5 * 64 + 2 * 64 * 4)
    assert sharding.bytes_per_device(params) == held


@pytest.mark.parametrize(("expert", "tensor"), [(1, 2), (1, 8), (2, 4), (2, 8), (4, 8), (8, 4)])
def test_full_size_parameters_per_device(expert, tensor):
    """Mixtral-8x7B, nothing allocated: at most 1.02 / N per device, beyond its 8 key/value heads too."""
    mesh = jax.sharding.AbstractMesh(
        (1, 1, expert, tensor), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
    )
    _, params = sharding.abstract_params(lambda r: Decoder(mixtral_8x7b().language, rngs=r), mesh)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert total == 46_702_792_704
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert held <= 1.02 * total / (expert * tensor)
