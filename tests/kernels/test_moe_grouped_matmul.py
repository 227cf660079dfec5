"""The experts in kernels for Hopper GPUs: interpreted here against numpy in float64, and compiled.

On a GPU they run in tests/gpu.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import sharding
from sphinx_jax.config import DecoderConfig
from sphinx_jax.kernels.grouped_matmul import TILES, Groups, grouped_matmul
from sphinx_jax.kernels.moe_grouped_matmul import Grouped, moe_grouped_matmul
from sphinx_jax.language.moe import MoE
from sphinx_jax.memory_plan.aot import compile_ahead
from sphinx_jax.memory_plan.hlo import largest_values
from sphinx_jax.model import bind
from tests.instruments import traffic

E, DIM, HIDDEN, K = 3, 128, 128, 2

ROUTINGS = {
    "even": lambda experts: experts,
    "an empty expert": lambda experts: experts % 2,
    "some elsewhere": lambda experts: np.where(experts == 0, E, experts),
}


@pytest.fixture
def interpreted():
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("needs jax 0.11 or newer, which can interpret kernels for Hopper")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def draw(tokens):
    random = np.random.default_rng(tokens)
    normal = lambda scale, *shape: jnp.asarray(random.normal(size=shape) * scale, jnp.bfloat16)
    x, dy = normal(1, tokens, DIM), normal(1, tokens, DIM)
    w_in, w_out = normal(DIM**-0.5, E, DIM, 2, HIDDEN), normal(HIDDEN**-0.5, E, HIDDEN, DIM)
    experts = random.random((tokens, E)).argsort(axis=-1)[:, :K].astype(np.int32)
    return x, experts, jnp.asarray(random.random((tokens, K)), jnp.bfloat16), w_in, w_out, dy


def close(found, reference):
    wrong = np.asarray(found, np.float64) - reference
    return np.linalg.norm(wrong) <= 1e-2 * np.linalg.norm(reference) and np.all(np.isfinite(wrong))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients(interpreted, experts_reference, routing):
    x, experts, weights, w_in, w_out, dy = draw(70)
    experts = ROUTINGS[routing](experts)
    expected, gradients = experts_reference(x, experts, weights, w_in, w_out, dy)
    assert close(moe_grouped_matmul(x, experts, weights, w_in, w_out), expected)
    y, pull = jax.vjp(lambda x, *rest: moe_grouped_matmul(x, experts, *rest), x, weights, w_in, w_out)
    for found, reference in zip((y, *pull(dy)), (expected, *gradients), strict=True):
        assert close(found, reference)


@pytest.mark.parametrize(("tokens", "routing"), [(1, "even"), (1, "some elsewhere"), (3, "some elsewhere")])
def test_a_few_tokens(interpreted, experts_reference, tokens, routing):
    x, experts, weights, w_in, w_out, _ = draw(tokens)
    experts = ROUTINGS[routing](experts)
    expected = experts_reference(x, experts, weights, w_in, w_out)
    assert close(moe_grouped_matmul(x, experts, weights, w_in, w_out), expected)


def test_large_tiles_with_rows_for_one_warpgroup(interpreted):
    """A tile full, one with two rows, one with a hundred; and an expert with none."""
    count, (x, _, _, w_in, *_) = np.array([130, 0, 100]), draw(512)
    w = w_in.reshape(E, DIM, -1)
    groups = Groups.of(jnp.asarray(count, jnp.int32), 4, TILES[1])
    assert groups.rows_of_tile.tolist() == [128, 2, 100, 0]
    y = grouped_matmul(x, w, groups)
    for first, expert in ((0, 0), (256, 2)):
        rows = slice(first, first + count[expert])
        assert close(y[rows], np.asarray(x[rows], np.float64) @ np.asarray(w[expert], np.float64))


FULL = DecoderConfig()
MESHES = [{}, {"tensor": 8}, {"expert": 4, "tensor": 2}, {"expert": 8}]
TOKENS = 2048


@pytest.fixture(scope="module")
def compiled(gpu_mesh):
    """(mesh, tokens) -> parameters, and one full-size mixture of experts on so many tokens compiled for H100s."""

    @functools.cache
    def program(axes, tokens):
        mesh = gpu_mesh("h100-80gb", **dict(axes))
        graph, params = sharding.abstract_params(lambda rngs: MoE(FULL, rngs=rngs), mesh, dtype=jnp.bfloat16)
        placed = sharding.named_sharding((None,) * 3, (1, tokens, FULL.dim), mesh)
        x = jax.ShapeDtypeStruct((1, tokens, FULL.dim), jnp.bfloat16, sharding=placed)
        made = sharding.Program(lambda params, x: bind(graph, params)(x)[0])
        return params, compile_ahead(made, (params, x), mesh).as_text()

    return lambda shape, tokens: program(tuple(shape.items()), tokens)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_word_reads_two_experts_and_copies_nothing(compiled, shape):
    params, text = compiled(shape, 1)
    read = traffic(text).arguments
    for number, leaf in enumerate(jax.tree.leaves(params)):
        own = leaf.sharding.shard_shape(leaf.shape)
        # Of fewer experts than two the device cannot read two.
        experts = min(K, own[0]) / own[0] if len(own) > 2 else 1
        assert read[number] == 2 * math.prod(own) * experts
    assert text.count('custom_call_target="mosaic_gpu') == 2 and " while(" not in text
    assert largest_values(text, 5 * 2**20) == []


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_prompt_makes_no_array_of_words_by_experts_by_hidden(compiled, shape):
    """The largest is of all assignments by the hidden dimension, and weights are not copied."""
    _, text = compiled(shape, TOKENS)
    assert text.count('custom_call_target="mosaic_gpu') == 2 and " while(" not in text
    local = FULL.num_experts // shape.get("expert", 1)
    rows = (TOKENS * K // TILES[1] + local) * TILES[1]
    widest = max(FULL.hidden_dim // shape.get("tensor", 1), FULL.dim)
    assert max(size for size, _ in largest_values(text, 2**20)) == 2 * rows * widest


@pytest.mark.parametrize("kind", ["in turn", "by chance", "skewed"])
def test_hardly_more_than_two_experts_a_word(kind):
    """Rows multiplied, in whole shares of a warpgroup's 64, are at most 1.15 times those asked for."""
    random = np.random.default_rng(0)
    share = 2.0 ** -np.arange(FULL.num_experts) if kind == "skewed" else np.ones(FULL.num_experts)
    by_chance = (np.log(share) + random.gumbel(size=(TOKENS, FULL.num_experts))).argsort(axis=1)[:, -K:]
    in_turn = (np.arange(TOKENS)[:, None] + np.arange(K)) % FULL.num_experts
    experts = jnp.asarray(in_turn if kind == "in turn" else by_chance, jnp.int32)
    grouped = Grouped.of(experts, FULL.num_experts)
    rows = np.asarray(grouped.groups.rows_of_tile)[: int(grouped.groups.tiles[0])]
    assert rows.sum() == TOKENS * K and rows.min() > 0
    assert (-(-rows // 64) * 64).sum() <= 1.15 * TOKENS * K
    # Every assignment has a row of its own, in a tile of its expert.
    row, tile = np.asarray(grouped.row).ravel(), TILES[1]
    assert len(set(row)) == TOKENS * K
    assert np.array_equal(np.asarray(grouped.groups.group_of_tile)[row // tile], np.asarray(experts).ravel())
    assert np.array_equal(np.asarray(grouped.token)[row], np.arange(TOKENS * K) // K)
