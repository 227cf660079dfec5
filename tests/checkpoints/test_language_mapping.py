"""The list of entries against the listing of the real checkpoint, and entries against plain numpy."""

import json
import math

import jax
import numpy as np
import pytest

import sharding
from sphinx_jax.checkpoints.loaded_model import abstract_model
from sphinx_jax.checkpoints.mapping.language import language_entries
from sphinx_jax.checkpoints.mapping.param_mapping import ParamMapping
from sphinx_jax.checkpoints.mapping.vision import is_ignored_vision_name, vision_entries
from sphinx_jax.config import mixtral_8x7b, sphinx_moe

SHARDS = 8


@pytest.fixture(scope="module")
def full_size():
    config = sphinx_moe()
    entries = language_entries(config.language, "sparse", unstacked=False, prefix="llma.")
    return entries + vision_entries(config.vision, config.language.dim)


def test_names_shapes_and_splits_of_the_published_checkpoint(full_size, golden_text):
    rows = [line.split("\t") for line in golden_text("keys_real_sphinx_moe.txt").splitlines() if line[0] != "#"]
    listed = {name: (tuple(json.loads(shape)), split) for name, shape, split in rows}
    assert len(listed) == 2309
    used = {name: listed[name] for name in listed if not is_ignored_vision_name(name)}
    assert {entry.name: entry.shape for entry in full_size} == {name: shape for name, (shape, _) in used.items()}
    for entry in full_size:
        shape, split = used[entry.name]
        expected = list(shape)
        if split != "-":
            # Joined experts shrink along their rows too: (experts x hidden / shards, dim).
            expected[0 if split.startswith("experts") else int(split)] //= SHARDS
        assert entry.shard_shape(SHARDS) == tuple(expected), entry.name


@pytest.mark.parametrize("unstacked", [True, False])
def test_full_size_entries_fill_every_parameter_once(unstacked):
    config = sphinx_moe()
    entries = language_entries(config.language, "sparse", unstacked=unstacked) + vision_entries(config.vision, 4096)
    _, abstract = abstract_model(config, sharding.make_mesh(), None, unstacked)
    filled = {}
    for entry in entries:
        filled[entry.path] = filled.get(entry.path, 0) + math.prod(entry.shape)
    leaves = {tuple(k.key for k in keys): leaf.size for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    assert filled == leaves


@pytest.mark.parametrize("style", ["base", "mistral_sparse", "hugging_face"])
def test_every_style_of_the_decoder_has_mixtrals_number_of_parameters(style):
    entries = language_entries(mixtral_8x7b().language, style, unstacked=True)
    assert sum(math.prod(entry.shape) for entry in entries) == 46_702_792_704
    assert len({entry.name for entry in entries}) == len(entries)


def test_entry_merges_and_permutes_dimensions():
    entry = ParamMapping("x", (12, 5), ("x",), (), (3, 2, 2, 5), (3, 0, (2, 1)))
    published = np.arange(60).reshape(12, 5)
    block = entry.to_ours(published)
    assert block.shape == entry.block_shape == (5, 3, 4)
    for row in range(12):
        # Row of head h at half f, place p is element 2 p + f of that head here.
        head, half, place = row // 4, row // 2 % 2, row % 2
        np.testing.assert_array_equal(block[:, head, 2 * place + half], published[row])
    np.testing.assert_array_equal(entry.to_published(block), published)


def test_members_are_dealt_out_in_runs():
    owners = [ParamMapping("x", (1,), ("x",), (), (1,), (0,), member=(i, 8)).owner(4) for i in range(8)]
    assert owners == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="cannot be dealt out"):
        ParamMapping("x", (1,), ("x",), (), (1,), (0,), member=(0, 8)).owner(3)
