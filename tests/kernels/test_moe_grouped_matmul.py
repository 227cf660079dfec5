"""The experts in kernels for Hopper GPUs: interpreted against numpy in float64, and compiled.

tests/gpu runs them on a GPU.
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
from sphinx_jax.kernels.grouped_matmul import TILE_ROWS, Groups, grouped_matmul
from sphinx_jax.kernels.moe_grouped_matmul import PermutedAssignments, moe_grouped_matmul
from sphinx_jax.language.moe import MoE
from sphinx_jax.memory_plan.aot import compile_aot
from sphinx_jax.model import bind
from tests.instruments import largest_values, traffic

E, DIM, HIDDEN, K = 3, 128, 128, 2

ROUTINGS = {
    "even": lambda experts: experts,
    "an empty expert": lambda experts: experts % 2,
    "some elsewhere": lambda experts: jnp.where(experts == 0, E, experts),
}


@pytest.fixture
def interpreted():
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("needs jax 0.11 or newer, which can interpret kernels for Hopper GPUs")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def draw(tokens):
    random = np.random.default_rng(tokens)

    def normal(scale, *shape):
        return jnp.asarray(random.normal(size=shape) * scale, jnp.bfloat16)

    x, dy = normal(1, tokens, DIM), normal(1, tokens, DIM)
    w_in, w_out = normal(DIM**-0.5, E, DIM, 2, HIDDEN), normal(HIDDEN**-0.5, E, HIDDEN, DIM)
    experts = random.random((tokens, E)).argsort(axis=-1)[:, :K].astype(np.int32)
    return x, jnp.asarray(experts), jnp.asarray(random.random((tokens, K)), jnp.bfloat16), w_in, w_out, dy


def is_close(actual, reference):
    error = np.asarray(actual, np.float64) - reference
    return np.linalg.norm(error) <= 1e-2 * np.linalg.norm(reference) and np.all(np.isfinite(error))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients(interpreted, moe_reference, routing):
    x, experts, weights, w_in, w_out, dy = draw(70)
    experts = ROUTINGS[routing](experts)
    expected, gradients = moe_reference(x, experts, weights, w_in, w_out, dy)
    assert is_close(moe_grouped_matmul(x, experts, weights, w_in, w_out), expected)
    y, vjp = jax.vjp(lambda x, *rest: moe_grouped_matmul(x, experts, *rest), x, weights, w_in, w_out)
    for actual, reference in zip((y, *vjp(dy)), (expected, *gradients), strict=True):
        assert is_close(actual, reference)


@pytest.mark.parametrize(("tokens", "routing"), [(1, "even"), (1, "some elsewhere"), (3, "some elsewhere")])
def test_a_tile_per_assignment(interpreted, moe_reference, tokens, routing):
    x, experts, weights, w_in, w_out, _ = draw(tokens)
    experts = ROUTINGS[routing](experts)
    expected = moe_reference(x, experts, weights, w_in, w_out)
    assert is_close(moe_grouped_matmul(x, experts, weights, w_in, w_out), expected)


def test_large_tiles_with_rows_for_one_warpgroup(interpreted):
    """A full tile, one with two rows and one with a hundred; and an expert without rows."""
    count, (x, _, _, w_in, *_) = np.array([130, 0, 100]), draw(512)
    w = w_in.reshape(E, DIM, -1)
    groups = Groups.from_counts(jnp.asarray(count, jnp.int32), 4, TILE_ROWS[1])
    assert groups.rows_of_tile.tolist() == [128, 2, 100, 0]
    y = grouped_matmul(x, w, groups)
    for first, expert in ((0, 0), (256, 2)):
        rows = slice(first, first + count[expert])
        assert is_close(y[rows], np.asarray(x[rows], np.float64) @ np.asarray(w[expert], np.float64))


FULL = DecoderConfig()
MESHES = [{}, {"tensor": 8}, {"expert": 4, "tensor": 2}, {"expert": 8}]
TOKENS = 2048


@pytest.fixture(scope="module")
def compiled(gpu_mesh):
    """(mesh shape, tokens) -> parameters and HLO of one full-size mixture-of-experts layer, compiled for H100s."""

    @functools.cache
    def compile_layer(axes, tokens):
        mesh = gpu_mesh("h100-80gb", **dict(axes))
        graph, params = sharding.abstract_params(lambda rngs: MoE(FULL, rngs=rngs), mesh, dtype=jnp.bfloat16)
        x_sharding = sharding.named_sharding((None,) * 3, (1, tokens, FULL.dim), mesh)
        x = jax.ShapeDtypeStruct((1, tokens, FULL.dim), jnp.bfloat16, sharding=x_sharding)
        program = sharding.Program(lambda params, x: bind(graph, params)(x)[0])
        return params, compile_aot(program, (params, x), mesh).as_text()

    return lambda shape, tokens: compile_layer(tuple(shape.items()), tokens)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_one_token_reads_two_experts_and_copies_nothing(compiled, shape):
    params, text = compiled(shape, 1)
    read = traffic(text).arguments
    for index, leaf in enumerate(jax.tree.leaves(params)):
        local_shape = leaf.sharding.shard_shape(leaf.shape)
        # A device with one expert reads one.
        fraction = min(K, local_shape[0]) / local_shape[0] if len(local_shape) > 2 else 1
        assert read[index] == 2 * math.prod(local_shape) * fraction
    assert text.count('custom_call_target="mosaic_gpu') == 2 and " while(" not in text
    assert largest_values(text, 5 * 2**20) == []


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"expert": 4, "tensor": 2}], ids=str)
def test_prefill_has_no_array_of_tokens_by_experts_by_hidden(compiled, shape):
    """The largest array is [assignments, hidden], and weights are not copied."""
    _, text = compiled(shape, TOKENS)
    assert text.count('custom_call_target="mosaic_gpu') == 2 and " while(" not in text
    local_experts = FULL.num_experts // shape.get("expert", 1)
    rows = (TOKENS * K // TILE_ROWS[1] + local_experts) * TILE_ROWS[1]
    widest = max(FULL.hidden_dim // shape.get("tensor", 1), FULL.dim)
    assert max(size for size, _ in largest_values(text, 2**20)) == 2 * rows * widest


@pytest.mark.parametrize("kind", ["round robin", "random", "skewed"])
def test_arithmetic_is_that_of_two_experts_per_token(kind):
    """Rows multiplied, in multiples of a warpgroup's 64, are at most 1.15 times the assignments."""
    random = np.random.default_rng(0)
    load = 2.0 ** -np.arange(FULL.num_experts) if kind == "skewed" else np.ones(FULL.num_experts)
    sampled = (np.log(load) + random.gumbel(size=(TOKENS, FULL.num_experts))).argsort(axis=1)[:, -K:]
    round_robin = (np.arange(TOKENS)[:, None] + np.arange(K)) % FULL.num_experts
    experts = jnp.asarray(round_robin if kind == "round robin" else sampled, jnp.int32)
    permuted = PermutedAssignments.sort(experts, FULL.num_experts)
    rows = np.asarray(permuted.groups.rows_of_tile)[: int(permuted.groups.num_tiles[0])]
    assert rows.sum() == TOKENS * K and rows.min() > 0
    assert (-(-rows // 64) * 64).sum() <= 1.15 * TOKENS * K
    # Each assignment has its own row, in a tile of its expert.
    row, tile_rows = np.asarray(permuted.row).ravel(), TILE_ROWS[1]
    assert len(set(row)) == TOKENS * K
    assert np.array_equal(np.asarray(permuted.groups.group_of_tile)[row // tile_rows], np.asarray(experts).ravel())
    assert np.array_equal(np.asarray(permuted.token)[row], np.arange(TOKENS * K) // K)
