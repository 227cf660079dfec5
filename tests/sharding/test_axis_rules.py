"""The axis rules: PartitionSpecs of every kind of fallback, and the errors."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import sharding
from sharding import LayoutError, Rule, local_index, num_shards, partition_spec, sharded_map


@pytest.fixture(scope="module")
def mesh222():
    return sharding.make_mesh(fsdp=2, expert=2, tensor=2)


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("experts", "embed", None, "mlp"), (4, 64, 2, 96), P("expert", "fsdp", None, "tensor")),
        (("embed", "kv_heads", None, "head_dim"), (64, 8, 6, 16), P("fsdp", ("tensor", "expert"), None, None)),
        (("vocab_rows", "channels"), (128, 64), P("fsdp", ("tensor", "expert"))),
        (("norm",), (64,), P(None)),
        # Two key/value heads on four model-parallel devices: "expert" falls back to "embed".
        (("embed", "kv_heads", None, "head_dim"), (64, 2, 6, 16), P(("fsdp", "expert"), "tensor", None, None)),
        # A batch of one on fsdp 2 is replicated.
        (("batch", "sequence"), (1, 7), P(None, None)),
    ],
)
def test_partition_spec(mesh222, names, shape, expected):
    assert partition_spec(names, shape, mesh222) == expected


def test_unknown_logical_axis(mesh222):
    with pytest.raises(LayoutError, match="unknown logical axis 'colour'"):
        partition_spec(("embed", "colour"), (4, 4), mesh222)


def test_two_dimensions_claim_one_mesh_axis(mesh222):
    with pytest.raises(LayoutError, match=r"'mlp' and 'vocab' .* both claim mesh axis 'tensor'"):
        partition_spec(("mlp", "vocab"), (8, 8), mesh222)


def test_indivisible_dimension_error_lists_sizes_that_fit(mesh222):
    with pytest.raises(LayoutError, match=r"'mlp' of size 9 .* axis 'tensor' of size 2.*fit: \[1, 3, 9\]"):
        partition_spec(("experts", "embed", None, "mlp"), (4, 64, 2, 9), mesh222)


def test_wrong_number_of_names(mesh222):
    with pytest.raises(LayoutError, match="2 dimensions"):
        partition_spec(("embed",), (4, 4), mesh222)


def test_custom_rules(mesh222):
    assert partition_spec(("embed",), (4,), mesh222, {"embed": Rule(("tensor",))}) == P("tensor")


def test_too_few_devices():
    with pytest.raises(LayoutError, match=r"needs 16 devices and there are 8.*--simulate-devices 16"):
        sharding.make_mesh(data=2, tensor=8)


def test_mesh_axis_below_one():
    with pytest.raises(LayoutError, match="'tensor' must be 1 or more, got 0"):
        sharding.make_mesh(tensor=0)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (1, (1, 1, 1, 1)),
        (2, (1, 1, 1, 2)),
        (8, (1, 1, 1, 8)),
        (16, (1, 1, 2, 8)),
        (6, (3, 1, 1, 2)),
        (128, (2, 1, 8, 8)),
    ],
)
def test_default_mesh(devices, expected):
    shape = sharding.default_mesh_shape(devices, kv_heads=8, experts=8)
    assert (shape.data, shape.fsdp, shape.expert, shape.tensor) == expected
    assert shape.size == devices


def test_local_index(mesh222):
    """A batch of six on fsdp 2: indices into the other shard, or past the end, become the shard's size, 3."""

    def body(shard, index):
        return shard * 0 + local_index(index, "batch", 6)[:3]

    index = jnp.array([1, 4, 6, 0, 0, 0])
    with sharding.mesh_context(mesh222):
        run = sharded_map(body, (("batch",), (None,)), ("batch",), sum_over=())
        assert jax.jit(run)(jnp.zeros(6, int), index).tolist() == [1, 3, 3, 3, 1, 3]
    assert local_index(index, "batch", 6) is index
    assert (num_shards("batch", mesh222), num_shards("kv_heads", mesh222), num_shards("norm", mesh222)) == (2, 4, 1)
