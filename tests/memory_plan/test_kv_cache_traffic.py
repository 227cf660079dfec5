"""The KV cache in compiled programs for absent GPUs: what is read follows the longest sequence, and no copies."""

import functools

import jax
import jax.numpy as jnp
import pytest

import sharding
from sharding import MeshShape
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.abstract_inputs import AbstractInputs
from sphinx_jax.memory_plan.aot import compile_aot, hlo_text, planning_mesh
from sphinx_jax.model import SphinxMoE
from tests.instruments import largest_values, traffic

pytestmark = pytest.mark.optimized

HEADS, HEAD_DIM, NUM_SEQS, CACHE_LEN = 8, 128, 16, 4096
CONFIG = SphinxConfig(
    DecoderConfig(
        dim=32 * HEAD_DIM, hidden_dim=64, num_layers=1, num_heads=32, num_kv_heads=HEADS, num_experts=4, vocab_size=512
    ),
    None,
)
"""The attention of one layer of Mixtral-8x7B, with little around it."""

POSITION = NUM_SEQS * HEADS * HEAD_DIM * 2
"""Bytes of one position of all sequences, of keys or of values."""

GPUS = ["a100-80gb", "h200"]


@pytest.fixture(scope="module")
def inputs(needs_gpu_compiler):
    """(GPU) -> mesh, abstract parameters, and the other arguments of the programs."""

    @functools.cache
    def make(gpu):
        mesh, _ = planning_mesh(find_gpu(gpu), MeshShape())
        graph, params = sharding.abstract_params(
            lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
        )
        return mesh, params, AbstractInputs(CONFIG, graph, params, mesh, NUM_SEQS, CACHE_LEN)

    return make


def kv_arguments(params):
    """The indices of the arguments that are keys and values of the cache, then of the prefixes."""
    first = len(jax.tree.leaves(params))
    return (first, first + 1), (first + 2, first + 3)


@pytest.mark.parametrize("gpu", GPUS)
def test_a_decode_step_reads_the_bucket_once(gpu, inputs):
    mesh, params, made = inputs(gpu)
    cancelled, scalar = made.replicated((NUM_SEQS,), jnp.bool_), made.replicated(())
    assert made.shape.cache_len == CACHE_LEN
    totals = {}
    for kv_len in (256, 2048, CACHE_LEN):
        args = (params, made.state, cancelled, made.stops, scalar, scalar, made.wants_top)
        text = hlo_text(compile_aot(made.programs.decode(made.state, kv_len), args, mesh))
        totals[kv_len] = traffic(text).total
        # In the loop's body a step writes one position of each cache in place; no other value is as large as a bucket.
        written = [name for _, name in largest_values(text, min(kv_len, 1024) * POSITION)]
        assert len(written) == 2 and all("scatter" in name or "dynamic-update-slice" in name for name in written)
    # Keys and values are read once, and scores and weights of 32 heads are a few float32 for each position; a copy
    # would be read, written and read again.
    for shorter, longer in ((256, 2048), (2048, CACHE_LEN)):
        added = (totals[longer] - totals[shorter]) / (longer - shorter)
        assert 0.85 * 2 * POSITION <= added <= 1.5 * 2 * POSITION


@pytest.mark.parametrize("gpu", GPUS)
def test_a_prefix_is_read_once(gpu, inputs):
    """A later chunk of four prompts: their own caches and four prefixes, once each; only what changes is written."""
    mesh, params, made = inputs(gpu)
    batch = 4
    args = (params, made.state, made._chunk(batch, 32), None, made.stops, made.wants_top)
    text = hlo_text(compile_aot(made.programs.prefill(made.state, first_chunk=False), args, mesh))
    read = traffic(text).arguments
    cache, prefixes = kv_arguments(params)
    for index in cache:
        assert read[index] <= 1.02 * batch * CACHE_LEN * POSITION / NUM_SEQS
    for index in prefixes:
        assert read[index] == batch * made.shape.prefix_len * POSITION / NUM_SEQS
    # Of the size of the whole cache are the in-place updates of keys and of values alone.
    whole = [name for _, name in largest_values(text, CACHE_LEN * POSITION)]
    assert len(whole) == 2 and all("scatter" in name for name in whole)
