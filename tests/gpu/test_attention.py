"""Attention on a GPU, flash on Hopper, cuDNN and blockwise, against float64 on the CPU."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sharding.log_once import log_once
from sphinx_jax.kernels import attention as attention_kernels
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_blockwise import blockwise_attention
from sphinx_jax.kernels.attention_mask import Causal

pytestmark = pytest.mark.gpu


@jax.jit
def with_gradients(q, k, v, d_out):
    out, vjp = jax.vjp(lambda *args: attention(*args, Causal()), q, k, v)
    return out, *vjp(d_out)


@jax.jit
def attend_from(start, q, k, v):
    return attention(q, k, v, Causal(start))


@pytest.mark.parametrize(
    ("start", "length", "cache_len"),
    [([2048], 2048, 4096), ([0, 77, 1000], 200, 1210), ([128, 300], 128, 768)],
)
def test_chunk(chunk_attention, caplog, start, length, cache_len):
    """The KV cache has stale values past the end of each sequence; earlier chunks filled it up to `start`."""
    if sharding.compute_capability() != "9.0":
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(length)
    start, k_shape = np.array(start), (len(start), cache_len, 2, 128)
    q = 3 * jnp.asarray(rng.normal(size=(len(start), length, 2, 2, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=k_shape), jnp.bfloat16) for _ in range(2))
    past = (np.arange(cache_len) >= (start + length)[:, None])[:, :, None, None]
    with caplog.at_level(logging.INFO):
        actual = attend_from(start, q, jnp.where(past, jnp.nan, k), jnp.where(past, jnp.nan, v))
    reference = chunk_attention(start, q, k, v)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, reference)


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype"),
    [
        (128, 128, "bfloat16"),
        (200, 128, "bfloat16"),
        (1000, 128, "bfloat16"),
        (2048, 128, "bfloat16"),
        (384, 64, "bfloat16"),
        (512, 128, "float16"),
    ],
)
def test_causal(causal_attention, caplog, length, head_dim, dtype):
    """Two key heads with two query heads each, and a wide range of scores."""
    if sharding.compute_capability() != "9.0":
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(length)
    batch = 1 if length > 1000 else 2
    q_shape, k_shape = (batch, length, 2, 2, head_dim), (batch, length, 2, head_dim)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (q_shape, k_shape, k_shape, q_shape))
    q = 3 * q
    log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        actual = with_gradients(q, k, v, d_out)
    assert f"attention of {length} queries on gpu: flash" in caplog.text
    for array, reference in zip(actual, causal_attention(q, k, v, d_out), strict=True):
        assert array.dtype == dtype
        assert_close(array, reference)


@pytest.mark.parametrize("length", [355, 1000, 2048])
def test_cudnn(causal_attention, length):
    """The default on Ampere, Ada and Blackwell; on Hopper cuDNN computes the same. Odd lengths are padded."""
    if not attention_kernels._has_cudnn("gpu"):
        pytest.skip("needs cuDNN: pip install 'jax[cuda12]'")
    rng = np.random.default_rng(length)
    q_shape, k_shape = (1, length, 2, 4, 128), (1, length, 2, 128)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (q_shape, k_shape, k_shape, q_shape)
    )

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(attention_kernels._local_cudnn, q, k, v)
        return out, *vjp(d_out)

    for array, reference in zip(run(q, k, v, d_out), causal_attention(q, k, v, d_out), strict=True):
        assert_close(array, reference)


def norm_per_position(x):
    return np.linalg.norm(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1), axis=1)


def assert_close(actual, reference):
    """Within rounding, as a whole and at every position."""
    error, norm = np.asarray(actual, np.float64) - reference, norm_per_position(reference)
    assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(reference)
    assert np.all(norm_per_position(error) < 2e-2 * (norm + np.median(norm)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [512, 1000])
def test_blockwise(attention_reference, length, packed):
    """On any GPU, blocks of 128: causal, where half of the blocks are skipped, or packed segments."""
    segment_ids = np.arange(length) // 300 if packed else np.zeros(length, int)
    dense_mask = np.tril(segment_ids[:, None] == segment_ids)[None].repeat(2, axis=0)
    mask = jnp.asarray(dense_mask) if packed else Causal()
    rng = np.random.default_rng(length)
    q_shape, k_shape = (2, length, 2, 2, 128), (2, length, 2, 128)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (q_shape, k_shape, k_shape, q_shape)
    )

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(lambda *qkv: blockwise_attention(*qkv, mask, 128), q, k, v)
        return out, *vjp(d_out)

    for array, reference in zip(run(q, k, v, d_out), attention_reference(q, k, v, d_out, dense_mask), strict=True):
        assert_close(array, reference)
