"""The list of mappings against the listing of the real checkpoint, and mappings against plain numpy."""

import json
import math

import jax
import numpy as np
import pytest

import sharding
from sphinx_jax.checkpoints.loaded_model import abstract_model
from sphinx_jax.checkpoints.mapping.language import language_mappings
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.checkpoints.mapping.vision import is_ignored_vision_name, vision_mappings
from sphinx_jax.config import mixtral_8x7b, sphinx_moe

SHARDS = 8


@pytest.fixture(scope="module")
def full_size():
    config = sphinx_moe()
    mappings = language_mappings(config.language, "sparse", unstacked=False, prefix="llma.")
    return mappings + vision_mappings(config.vision, config.language.dim)


def test_names_shapes_and_splits_of_the_published_checkpoint(full_size, golden_text):
    rows = [line.split("\t") for line in golden_text("keys_real_sphinx_moe.txt").splitlines() if line[0] != "#"]
    listed = {name: (tuple(json.loads(shape)), shard_dim) for name, shape, shard_dim in rows}
    assert len(listed) == 2309
    used = {name: listed[name] for name in listed if not is_ignored_vision_name(name)}
    assert {mapping.name: mapping.shape for mapping in full_size} == {name: shape for name, (shape, _) in used.items()}
    for mapping in full_size:
        shape, shard_dim = used[mapping.name]
        expected = list(shape)
        if shard_dim != "-":
            # Joined experts shrink along their rows too: (experts x hidden / shards, dim).
            expected[0 if shard_dim.startswith("experts") else int(shard_dim)] //= SHARDS
        assert mapping.shard_shape(SHARDS) == tuple(expected), mapping.name


@pytest.mark.parametrize("unstacked", [True, False])
def test_full_size_mappings_fill_every_parameter_once(unstacked):
    config = sphinx_moe()
    mappings = language_mappings(config.language, "sparse", unstacked=unstacked) + vision_mappings(config.vision, 4096)
    _, abstract = abstract_model(config, sharding.make_mesh(), None, unstacked)
    filled = {}
    for mapping in mappings:
        filled[mapping.path] = filled.get(mapping.path, 0) + math.prod(mapping.shape)
    leaves = {tuple(k.key for k in keys): leaf.size for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    assert filled == leaves


@pytest.mark.parametrize("style", ["base", "mistral_sparse", "hugging_face"])
def test_every_style_of_the_decoder_has_mixtrals_number_of_parameters(style):
    mappings = language_mappings(mixtral_8x7b().language, style, unstacked=True)
    assert sum(math.prod(mapping.shape) for mapping in mappings) == 46_702_792_704
    assert len({mapping.name for mapping in mappings}) == len(mappings)


def test_mapping_merges_and_permutes_dimensions():
    mapping = ParamMapping("x", (12, 5), ("x",), (), (3, 2, 2, 5), (3, 0, (2, 1)))
    published = np.arange(60).reshape(12, 5)
    block = mapping.to_param(published)
    assert block.shape == mapping.block_shape == (5, 3, 4)
    for row in range(12):
        # Row of head h at half f, place p is element 2 p + f of that head here.
        head, half, place = row // 4, row // 2 % 2, row % 2
        np.testing.assert_array_equal(block[:, head, 2 * place + half], published[row])
    np.testing.assert_array_equal(mapping.to_published(block), published)


def test_experts_are_assigned_to_shards_in_runs():
    owners = [ParamMapping("x", (1,), ("x",), (), (1,), (0,), expert=(i, 8)).expert_shard(4) for i in range(8)]
    assert owners == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="do not divide"):
        ParamMapping("x", (1,), ("x",), (), (1,), (0,), expert=(0, 8)).expert_shard(3)
