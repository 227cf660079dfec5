"""Attention as a GPU computes it, in a Hopper's kernels and in blocks, against float64 on the CPU."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sharding.log_once import log_once
from sphinx_jax.kernels.attention import attention
from sphinx_jax.kernels.attention_blockwise import attention_in_blocks
from sphinx_jax.kernels.attention_mask import Causal

pytestmark = pytest.mark.gpu


@jax.jit
def with_gradients(q, k, v, d_out):
    out, gradients = jax.vjp(lambda *args: attention(*args, Causal()), q, k, v)
    return out, *gradients(d_out)


@jax.jit
def later(start, q, k, v):
    return attention(q, k, v, Causal(start))


@pytest.mark.parametrize(
    ("start", "length", "slots"),
    [([2048], 2048, 4096), ([0, 77, 1000], 200, 1210), ([128, 300], 128, 768)],
)
def test_later_pieces(later_attention, caplog, start, length, slots):
    """In a cache that holds anything past the end of a row, for the beginning of each row was read before."""
    if sharding.compute_capability() != "9.0":
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(length)
    start, keys = np.array(start), (len(start), slots, 2, 128)
    q = 3 * jnp.asarray(rng.normal(size=(len(start), length, 2, 2, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=keys), jnp.bfloat16) for _ in range(2))
    past = (np.arange(slots) >= (start + length)[:, None])[:, :, None, None]
    with caplog.at_level(logging.INFO):
        found = later(start, q, jnp.where(past, jnp.nan, k), jnp.where(past, jnp.nan, v))
    reference = later_attention(start, q, k, v)
    assert found.dtype == jnp.bfloat16
    near_everywhere(found, reference)


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
    """Two key heads with two heads of queries each, and scores far from even."""
    if sharding.compute_capability() != "9.0":
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(length)
    batch = 1 if length > 1000 else 2
    heads, keys = (batch, length, 2, 2, head_dim), (batch, length, 2, head_dim)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (heads, keys, keys, heads))
    q = 3 * q
    log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        ours = with_gradients(q, k, v, d_out)
    assert f"attention of {length} queries on gpu: flash" in caplog.text
    for found, reference in zip(ours, causal_attention(q, k, v, d_out), strict=True):
        assert found.dtype == dtype
        near_everywhere(found, reference)


def near_everywhere(found, reference):
    """Within rounding as a whole, nor does a single position hide among the others."""
    wrong = np.asarray(found, np.float64) - reference
    assert np.linalg.norm(wrong) < 1e-2 * np.linalg.norm(reference)
    size = lambda x: np.linalg.norm(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1), axis=1)
    assert np.all(size(wrong) < 2e-2 * (size(reference) + np.median(size(reference))))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [512, 1000])
def test_in_blocks(attention_reference, length, packed):
    """On any GPU: of 128 positions, with half of them left out, or two texts side by side."""
    text = np.arange(length) // 300 if packed else np.zeros(length, int)
    seen = np.tril(text[:, None] == text)[None].repeat(2, axis=0)
    mask = jnp.asarray(seen) if packed else Causal()
    rng = np.random.default_rng(length)
    heads, keys = (2, length, 2, 2, 128), (2, length, 2, 128)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (heads, keys, keys, heads))

    @jax.jit
    def run(q, k, v, d_out):
        out, gradients = jax.vjp(lambda *qkv: attention_in_blocks(*qkv, mask, 128), q, k, v)
        return out, *gradients(d_out)

    for found, reference in zip(run(q, k, v, d_out), attention_reference(q, k, v, d_out, seen), strict=True):
        near_everywhere(found, reference)
