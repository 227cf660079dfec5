"""Attention against plain numpy; on Hopper GPUs interpreted here, and compiled."""

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
from sphinx_jax.memory_plan.aot import compile_ahead
from sphinx_jax.memory_plan.inference import inference_jobs
from sphinx_jax.model import SphinxMoE, bind


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_values(queries, masked):
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(2, queries, 3, 2, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 7, 3, 8)).astype(np.float32)
    mask = rng.random((2, queries, 7)) < 0.5 if masked else np.ones((2, queries, 7), bool)
    mask[..., 0] = True
    ours = attention(q, k, v, mask if masked else None)
    for b, t, h, g in np.ndindex(q.shape[:-1]):
        seen = mask[b, t]
        scores = k[b, seen, h].astype(np.float64) @ q[b, t, h, g] / np.sqrt(8)
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(ours[b, t, h, g], weights @ v[b, seen, h] / weights.sum(), rtol=1e-5, atol=1e-6)


def drawn(dtype, length, kv_heads=2, group=2, head_dim=64, batch=2):
    """q, k, v and a gradient of the output."""
    rng = np.random.default_rng(length)
    heads, keys = (batch, length, kv_heads, group, head_dim), (batch, length, kv_heads, head_dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in (heads, keys, keys, heads)]


@jax.jit
def with_gradients(q, k, v, d_out):
    out, gradients = jax.vjp(lambda *args: attention(*args, Causal()), q, k, v)
    return out, *gradients(d_out)


def far(ours, reference):
    """Distance between two arrays, as a part of the second's size."""
    return np.linalg.norm(np.asarray(ours, np.float64) - reference) / np.linalg.norm(reference)


def test_causal_without_a_mask(causal_attention):
    args = drawn(jnp.float32, 9)
    assert all(far(*pair) < 1e-6 for pair in zip(with_gradients(*args), causal_attention(*args), strict=True))


def product(a, b, onto=0.0):
    """Of the tensor cores: the interpreter knows it with both sides in shared memory only."""
    a, b = (side if isinstance(side, jax.Array) else side[...] for side in (a, b))
    return jnp.dot(a, b, preferred_element_type=jnp.float32) + onto


@pytest.fixture
def interpreted(monkeypatch):
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("needs jax 0.11 or newer, which can interpret kernels for Hopper")
    monkeypatch.setattr(sharding, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(attention_flash, "_product", product)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@pytest.mark.parametrize("length", [128, 200])
def test_on_hopper(interpreted, causal_attention, caplog, length):
    """Also of a length that is no multiple of the tile: nothing of the filling up is seen."""
    args = drawn(jnp.bfloat16, length, batch=1)
    with caplog.at_level(logging.INFO):
        ours = with_gradients(*args)
    assert f"attention of {length} queries on cpu: flash" in caplog.text
    # Two products of numbers of 8 bits, each rounded once more.
    assert all(far(*pair) < 5e-3 for pair in zip(ours, causal_attention(*args), strict=True))


def cached(dtype, start, length, slots, kv_heads=2, group=2, head_dim=64):
    """q, k and v of texts whose first `start` positions were read before, and the same with NaN past their ends."""
    rng = np.random.default_rng(length)
    q = jnp.asarray(rng.normal(size=(len(start), length, kv_heads, group, head_dim)), dtype)
    k, v = jnp.asarray(rng.normal(size=(2, len(start), slots, kv_heads, head_dim)), dtype)
    past = np.arange(slots) >= (start + length)[:, None]
    return q, k, v, *(jnp.where(past[:, :, None, None], jnp.nan, x) for x in (k, v))


@jax.jit
def later(start, q, k, v):
    return attention(q, k, v, Causal(start))


@pytest.mark.parametrize("length", [1, 9])
def test_later_pieces_without_a_mask(later_attention, length):
    start = np.array([0, 5, 14])
    q, k, v, _, _ = cached(jnp.float32, start, length, 23)
    assert far(later(start, q, k, v), later_attention(start, q, k, v)) < 1e-6


def test_later_pieces_on_hopper(interpreted, later_attention, caplog):
    """Of a length, from starts and in a cache that are no multiples of the tile. Past a row's end nothing counts."""
    start = np.array([0, 77, 256])
    q, k, v, k_then_nan, v_then_nan = cached(jnp.bfloat16, start, 216, 500, kv_heads=1)
    with caplog.at_level(logging.INFO):
        ours = later(start, q, k_then_nan, v_then_nan)
    assert "attention of 216 queries on cpu: flash" in caplog.text
    assert far(ours, later_attention(start, q, k, v)) < 5e-3


def plain(q, k, v, start=None):
    """What the kernel computes, of `group` heads side by side for each key head."""
    start = jnp.zeros(len(q), int) if start is None else start
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]).astype(jnp.float32)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    sees = jnp.arange(k.shape[1]) <= start[:, None, None] + jnp.arange(q.shape[1])[:, None]
    scores = jnp.where(sees[:, None, None], scores, -jnp.inf)
    out = jnp.einsum("bkgqs,bskd->bqkgd", jax.nn.softmax(scores), v.astype(jnp.float32))
    return out.reshape(*out.shape[:2], -1, out.shape[-1]).astype(k.dtype)


def test_on_several_hoppers(causal_attention, monkeypatch):
    """Two devices share a key head: each has one of its queries' heads, and the gradients of keys are added up.

    The interpreter mixes up the devices' memory, so the kernel itself is left out.
    """
    parts = []
    monkeypatch.setattr(sharding, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(attention_flash, "flash_attention", lambda q, *kv: parts.append(q.shape) or plain(q, *kv))
    args = drawn(jnp.bfloat16, 136)
    with sharding.mesh_context(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        ours = jax.jit(with_gradients.__wrapped__)(*args)
    assert set(parts) == {(1, 256, 1, 64)}
    assert all(far(*pair) < 1e-2 for pair in zip(ours, causal_attention(*args), strict=True))


def test_later_pieces_on_several_hoppers(later_attention, monkeypatch):
    """Each device has the starts of its own rows."""
    parts = []
    record = lambda start, q, *kv: parts.append(q.shape) or plain(q, *kv, start)
    monkeypatch.setattr(sharding, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(attention_flash, "flash_attention_from", record)
    start = np.array([0, 77, 5, 256])
    q, k, v, k_then_nan, v_then_nan = cached(jnp.bfloat16, start, 136, 400)
    with sharding.mesh_context(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        ours = jax.jit(later.__wrapped__)(start, q, jnp.nan_to_num(k_then_nan), v_then_nan)
    assert set(parts) == {(2, 256, 1, 64)}
    assert far(ours, later_attention(start, q, k, v)) < 1e-2


LENGTH = 2048
CONFIG = SphinxConfig(DecoderConfig(256, 512, 2, num_heads=4, num_kv_heads=2, num_experts=4, vocab_size=256), None)


def kernels_and_scores(compiled):
    """How often a kernel of attention is called, and whether something as large as all scores is made: no other
    dimension has so many elements as there are keys, of a prompt or in the cache.
    """
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    return sum("_tile/" in line for line in calls), re.search(rf"{LENGTH},[2-9]\d\d\d\]", text) is not None


def test_a_prompt_read_on_hopper(gpu_mesh):
    """Without scores, from its beginning on."""
    mesh = gpu_mesh("h100-80gb", tensor=2)
    make = lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs)
    graph, params = sharding.abstract_params(make, mesh, dtype=jnp.bfloat16)
    jobs, _ = inference_jobs(CONFIG, graph, params, mesh, max_num_seqs=1, max_model_len=LENGTH + 64)
    found = {job.name: kernels_and_scores(compile_ahead(job.program, job.args, mesh)) for job in jobs}
    layers = CONFIG.language.num_layers
    assert found == {
        "read a prompt's beginning": (layers, False), "read on": (layers, False), "decode one token": (0, False)
    }  # fmt: skip


@pytest.mark.parametrize("segment_ids", [False, True])
def test_training_on_hopper(gpu_mesh, segment_ids):
    """Whole sequences keep no scores in the gradient either; segment ids need a mask, and have them."""
    mesh = gpu_mesh("h100-80gb", fsdp=2, expert=2, tensor=2)
    make = lambda rngs: SphinxMoE(CONFIG, rngs=rngs)
    graph, params = sharding.abstract_params(make, mesh, dtype=jnp.bfloat16)
    place = sharding.named_sharding(("batch", None), (2, LENGTH), mesh)
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32, sharding=place)

    def loss(params, tokens):
        return jnp.sum(bind(graph, params)(tokens, segment_ids=tokens if segment_ids else None, remat="block")[0])

    compiled = compile_ahead(sharding.Program(jax.grad(loss)), (params, tokens), mesh)
    # In the loop over layers: forwards, once more in the gradient, and the two parts of that.
    assert kernels_and_scores(compiled) == ((0, True) if segment_ids else (4, False))
