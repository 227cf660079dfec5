"""Attention against numpy; the kernels for Hopper GPUs are interpreted, and compiled."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import sharding
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.kernels import attention_flash
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.memory_plan.aot import compile_aot
from sphinx_jax.memory_plan.inference import inference_jobs
from sphinx_jax.model import SphinxMoE, bind


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_values(queries, masked):
    rng = np.random.default_rng(queries)
    q = jnp.asarray(rng.normal(size=(2, queries, 3, 2, 8)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 7, 3, 8)), jnp.float32)
    mask = rng.random((2, queries, 7)) < 0.5 if masked else np.ones((2, queries, 7), bool)
    mask[..., 0] = True
    actual = attention(q, k, v, jnp.asarray(mask) if masked else None)
    q, k, v = map(np.asarray, (q, k, v))
    for b, t, h, g in np.ndindex(q.shape[:-1]):
        visible = mask[b, t]
        scores = k[b, visible, h].astype(np.float64) @ q[b, t, h, g] / np.sqrt(8)
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(actual[b, t, h, g], weights @ v[b, visible, h] / weights.sum(), rtol=1e-5, atol=1e-6)


def draw(dtype, length, kv_heads=2, group=2, head_dim=64, batch=2):
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(length)
    q_shape, k_shape = (batch, length, kv_heads, group, head_dim), (batch, length, kv_heads, head_dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in (q_shape, k_shape, k_shape, q_shape)]


@jax.jit
def with_gradients(q, k, v, d_out):
    out, vjp = jax.vjp(lambda *args: attention(*args, Causal()), q, k, v)
    return out, *vjp(d_out)


def relative_error(actual, reference):
    """Of the whole array, in the Euclidean norm."""
    return np.linalg.norm(np.asarray(actual, np.float64) - reference) / np.linalg.norm(reference)


def test_causal(causal_attention):
    args = draw(jnp.float32, 9)
    assert all(
        relative_error(*pair) < 1e-6 for pair in zip(with_gradients(*args), causal_attention(*args), strict=True)
    )


def wgmma(a, b, accumulator=0.0):
    """The interpreter supports wgmma with both operands in shared memory only."""
    a, b = (operand if isinstance(operand, jax.Array) else operand[...] for operand in (a, b))
    return jnp.dot(a, b, preferred_element_type=jnp.float32) + accumulator


@pytest.fixture
def interpreted(monkeypatch):
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("needs jax 0.11 or newer, which can interpret kernels for Hopper GPUs")
    monkeypatch.setattr(sharding, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(attention_flash, "_wgmma", wgmma)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@pytest.mark.parametrize("length", [128, 200])
def test_causal_on_hopper(interpreted, causal_attention, caplog, length):
    """Also with a length that is no multiple of the tile: no query attends to the padding."""
    args = draw(jnp.bfloat16, length, batch=1)
    with caplog.at_level(logging.INFO):
        actual = with_gradients(*args)
    assert f"attention of {length} queries on cpu: flash" in caplog.text
    # Two products of bfloat16 operands with 8 significant bits, and one more rounding after each.
    assert all(relative_error(*pair) < 5e-3 for pair in zip(actual, causal_attention(*args), strict=True))


def draw_chunk(dtype, start, length, cache_len, kv_heads=2, group=2, head_dim=64):
    """q, k and v of chunks that begin at `start`, and k and v with NaN past the end of each sequence."""
    rng = np.random.default_rng(length)
    q = jnp.asarray(rng.normal(size=(len(start), length, kv_heads, group, head_dim)), dtype)
    k, v = jnp.asarray(rng.normal(size=(2, len(start), cache_len, kv_heads, head_dim)), dtype)
    past = np.arange(cache_len) >= (start + length)[:, None]
    return q, k, v, *(jnp.where(past[:, :, None, None], jnp.nan, x) for x in (k, v))


@jax.jit
def attend_from(start, q, k, v):
    return attention(q, k, v, Causal(start))


@pytest.mark.parametrize("length", [1, 9])
def test_chunk(chunk_attention, length):
    start = np.array([0, 5, 14])
    q, k, v, _, _ = draw_chunk(jnp.float32, start, length, 23)
    assert relative_error(attend_from(start, q, k, v), chunk_attention(start, q, k, v)) < 1e-6


@pytest.mark.parametrize("slice_cost", [1, 3, None])
def test_decode_of_a_part_of_the_cache(chunk_attention, monkeypatch, slice_cost):
    """Read in place, as on GPUs, copied, or in C++: what is past the part is not read, whatever it holds."""
    if slice_cost is not None:
        monkeypatch.setitem(attention.__globals__, "attends_natively", lambda q, k: False)
        monkeypatch.setitem(attention.__globals__, "kv_slice_cost", lambda: slice_cost)
    start = np.array([0, 5, 14])
    q, k, v, _, _ = draw_chunk(jnp.float32, start, 1, 40)
    filled = jnp.arange(40)[:, None, None] < 16
    k_nan, v_nan = (jnp.where(filled, x, jnp.nan) for x in (k, v))
    actual = jax.jit(lambda *args: attention(*args, Causal(jnp.asarray(start), 16)))(q, k_nan, v_nan)
    assert relative_error(actual, chunk_attention(start, q, k[:, :16], v[:, :16])) < 1e-6


def test_chunk_on_hopper(interpreted, chunk_attention, caplog):
    """Chunk length, starts and cache_len are no multiples of the tile. Keys past a sequence's end are ignored."""
    start = np.array([0, 77, 256])
    q, k, v, k_nan, v_nan = draw_chunk(jnp.bfloat16, start, 216, 500, kv_heads=1)
    with caplog.at_level(logging.INFO):
        actual = attend_from(start, q, k_nan, v_nan)
    assert "attention of 216 queries on cpu: flash" in caplog.text
    assert relative_error(actual, chunk_attention(start, q, k, v)) < 5e-3


def reference_kernel(q, k, v, start=None):
    """What the kernel computes, with the query heads of each key head adjacent."""
    start = jnp.zeros(len(q), int) if start is None else start
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]).astype(jnp.float32)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    mask = jnp.arange(k.shape[1]) <= start[:, None, None] + jnp.arange(q.shape[1])[:, None]
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    out = jnp.einsum("bkgqs,bskd->bqkgd", jax.nn.softmax(scores), v.astype(jnp.float32))
    return out.reshape(*out.shape[:2], -1, out.shape[-1]).astype(k.dtype)


def test_causal_on_several_hoppers(causal_attention, monkeypatch):
    """Two devices share a key head: each has one of its query heads, and the gradients of keys are all-reduced.

    The interpreter confuses the memory of the devices, so a reference replaces the kernel.
    """
    shapes = []

    def record(q, *kv):
        shapes.append(q.shape)
        return reference_kernel(q, *kv)

    monkeypatch.setattr(sharding, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(attention_flash, "flash_attention", record)
    args = draw(jnp.bfloat16, 136)
    with sharding.mesh_context(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        actual = jax.jit(with_gradients.__wrapped__)(*args)
    assert set(shapes) == {(1, 256, 1, 64)}
    assert all(relative_error(*pair) < 1e-2 for pair in zip(actual, causal_attention(*args), strict=True))


def test_chunk_on_several_hoppers(chunk_attention, monkeypatch):
    """Each device has the starts of its own sequences."""
    shapes = []

    def record(start, q, *kv):
        shapes.append(q.shape)
        return reference_kernel(q, *kv, start)

    monkeypatch.setattr(sharding, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(attention_flash, "flash_attention_with_kv_cache", record)
    start = np.array([0, 77, 5, 256])
    q, k, v, k_nan, v_nan = draw_chunk(jnp.bfloat16, start, 136, 400)
    with sharding.mesh_context(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        actual = jax.jit(attend_from.__wrapped__)(start, q, jnp.nan_to_num(k_nan), v_nan)
    assert set(shapes) == {(2, 256, 1, 64)}
    assert relative_error(actual, chunk_attention(start, q, k, v)) < 1e-2


LENGTH = 2048
CONFIG = SphinxConfig(DecoderConfig(256, 512, 2, num_heads=4, num_kv_heads=2, num_experts=4, vocab_size=256), None)


def kernels_and_scores(compiled):
    """How many calls of flash kernels a program has, and whether it has an array of all scores.

    No other array ends in dimensions of so many queries and keys, of a prompt or in the KV cache.
    """
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    return sum("/_flash_" in line for line in calls), re.search(rf"{LENGTH},[2-9]\d\d\d\]", text) is not None


@pytest.mark.slow
@pytest.mark.optimized
def test_prefill_on_hopper(gpu_mesh):
    """No scores in memory, from the first chunk on."""
    mesh = gpu_mesh("h100-80gb", tensor=2)
    graph, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
    )
    jobs, _ = inference_jobs(CONFIG, graph, params, mesh, max_num_seqs=1, max_model_len=LENGTH + 64)
    layers = CONFIG.language.num_layers
    actual = {job.name: kernels_and_scores(compile_aot(job.program, job.args, mesh)) for job in jobs}
    expected = {"prefill": (layers, False), "chunked prefill": (layers, False), "decode step": (0, False)}
    assert actual == expected


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("segment_ids", [False, True])
def test_training_on_hopper(gpu_mesh, segment_ids):
    """Causal attention has no scores in the backward pass either; segment ids need a boolean mask, and have them."""
    mesh = gpu_mesh("h100-80gb", fsdp=2, expert=2, tensor=2)
    graph, params = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), mesh, dtype=jnp.bfloat16)
    tokens_sharding = sharding.named_sharding(("batch", None), (2, LENGTH), mesh)
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32, sharding=tokens_sharding)

    def loss(params, tokens):
        return jnp.sum(bind(graph, params)(tokens, segment_ids=tokens if segment_ids else None, remat="block")[0])

    compiled = compile_aot(sharding.Program(jax.grad(loss)), (params, tokens), mesh)
    # In the loop over layers: forward, rematerialised forward, and the two kernels of the backward pass.
    assert kernels_and_scores(compiled) == ((0, True) if segment_ids else (4, False))
