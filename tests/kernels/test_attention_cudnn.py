"""cuDNN's attention: chosen on Ampere, Ada and Blackwell for causal masks, with the numbers of any implementation."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sharding.log_once import log_once
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.kernels import attention as module
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.memory_plan.aot import compile_aot, hlo_text
from sphinx_jax.memory_plan.cudnn_workspace import cudnn_workspace_bytes
from sphinx_jax.memory_plan.inference import inference_jobs
from sphinx_jax.model import SphinxMoE, bind

LENGTH = 2048
CONFIG = SphinxConfig(DecoderConfig(256, 512, 2, num_heads=4, num_kv_heads=2, num_experts=4, vocab_size=256), None)


@pytest.fixture
def on_ampere(monkeypatch):
    """An A100 whose cuDNN is jax's own implementation of the same function; returns the shapes of its calls."""
    shapes = []

    def reference(q, k, v):
        shapes.append((q.shape, k.shape))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    monkeypatch.setattr(sharding, "compute_capability", lambda: "8.0")
    monkeypatch.setattr(module, "_has_cudnn", lambda platform: True)
    monkeypatch.setattr(module, "_cudnn_attention", reference)
    return shapes


def draw(length):
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(length)
    q_shape, k_shape = (2, length, 2, 2, 64), (2, length, 2, 64)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (q_shape, k_shape, k_shape, q_shape)]


def relative_error(actual, reference):
    return np.linalg.norm(np.asarray(actual, np.float64) - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("length", [128, 201])
def test_values_and_gradients(on_ampere, causal_attention, length):
    """Query heads beside their key head, and lengths padded to multiples of 64, which no query attends to."""
    *qkv, d_out = draw(length)
    out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, Causal()), *qkv)
    assert set(on_ampere) == {((2, -(-length // 64) * 64, 4, 64), (2, -(-length // 64) * 64, 2, 64))}
    for actual, reference in zip((out, *vjp(d_out)), causal_attention(*qkv, d_out), strict=True):
        assert relative_error(actual, reference) < 1e-2


def test_on_a_mesh(on_ampere, causal_attention):
    """Each device has its own sequences and heads."""
    *qkv, d_out = draw(128)
    with sharding.mesh_context(sharding.make_mesh(fsdp=2, tensor=2, expert=2)):
        out = jax.jit(lambda q, k, v: attention(q, k, v, Causal()))(*qkv)
    assert set(on_ampere) == {((1, 128, 1, 64), (1, 128, 1, 64))}
    assert relative_error(out, causal_attention(*qkv, d_out)[0]) < 1e-2


def test_masks_that_cudnn_has_not(on_ampere):
    """Chunks that begin later, segments, no mask, and one query; float32, and more keys than queries."""
    q, k, v, _ = draw(128)
    start, segments = jnp.zeros(2, jnp.int32), jnp.tril(jnp.ones((1, 128, 128), bool))
    for mask in (Causal(start), segments, None):
        attention(q, k, v, mask)
    attention(q[:, :1], k, v, Causal(start))
    attention(q[:, :64], k, v, Causal())
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    attention(q, k, v, Causal())
    assert on_ampere == []


@pytest.mark.parametrize("capability", ["9.0", "7.5", None])
def test_other_gpus(on_ampere, monkeypatch, capability):
    monkeypatch.setattr(sharding, "compute_capability", lambda: capability)
    monkeypatch.setattr(module, "_supports_flash", lambda q, k: False)
    q, k, v, _ = draw(128)
    attention(q, k, v, Causal())
    assert on_ampere == []


def test_without_the_library_is_logged_once(on_ampere, monkeypatch, caplog):
    def missing(*args, **kwargs):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.undo()
    monkeypatch.setattr(sharding, "compute_capability", lambda: "8.9")
    monkeypatch.setattr(module, "_cudnn_attention", missing)
    module._has_cudnn.cache_clear()
    log_once.cache_clear()
    q, k, v, _ = draw(128)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attention(q, k, v, Causal())
    module._has_cudnn.cache_clear()
    assert caplog.text.count("no cuDNN attention on cpu: cuDNN is not detected.; install nvidia-cudnn-cu12") == 1
    assert "attention of 128 queries on cpu: dense" in caplog.text


def calls_and_scores(compiled):
    """cuDNN's calls in a program, forward and backward, and whether it has an array of all scores."""
    text = compiled.as_text()
    calls = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', text)
    forward = sum("Backward" not in call for call in calls)
    return forward, len(calls) - forward, re.search(rf"{LENGTH},[2-9]\d\d\d\]", text) is not None


@pytest.mark.optimized
@pytest.mark.parametrize("gpu", ["a100-80gb", "rtx4090"])
def test_training_compiled(gpu_mesh, gpu):
    """In the loops over layers: one call forward, one rematerialised, one backward; no scores in memory."""
    mesh = gpu_mesh(gpu, fsdp=2, expert=2, tensor=2)
    graph, params = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), mesh, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct(
        (2, LENGTH), jnp.int32, sharding=sharding.named_sharding(("batch", None), (2, LENGTH), mesh)
    )

    def loss(params, tokens):
        return jnp.sum(bind(graph, params)(tokens, remat="block")[0])

    compiled = compile_aot(sharding.Program(jax.grad(loss)), (params, tokens), mesh)
    assert calls_and_scores(compiled) == (2, 1, False)
    # A device has one sequence and one head: float32 gradients of its queries, and sums of their softmax.
    assert cudnn_workspace_bytes(hlo_text(compiled)) == LENGTH * (4 * 64 + 4)


@pytest.mark.slow
@pytest.mark.optimized
def test_prefill_compiled(gpu_mesh):
    """The first chunk by cuDNN, in each layer; later chunks and decode steps are not."""
    mesh = gpu_mesh("a100-80gb", tensor=2)
    graph, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
    )
    jobs, _ = inference_jobs(CONFIG, graph, params, mesh, max_num_seqs=1, max_model_len=LENGTH + 64)
    calls = {job.name: calls_and_scores(compile_aot(job.program, job.args, mesh))[:2] for job in jobs}
    assert calls == {"prefill": (CONFIG.language.num_layers, 0), "chunked prefill": (0, 0), "decode step": (0, 0)}
