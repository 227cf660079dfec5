"""Attention of decode steps in C++ against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels import native_library
from sphinx_jax.kernels.attention import attention, kv_slice_cost
from sphinx_jax.kernels.attention_mask import Causal

pytestmark = pytest.mark.skipif(not native_library.has_library(), reason="needs a C++ compiler: apt-get install g++")


def attend(q, k, v, start):
    """attention(...) compiled for one device, with the number of calls of the library."""
    # A function of its own: jax would reuse what it traced for another mesh.
    program = jax.jit(lambda q, k, v, start: attention(q, k, v, Causal(start))).lower(q, k, v, start).compile()
    return program(q, k, v, start), program.as_text().count('custom_call_target="sphinx_decode_attention"')


def expected(q, k, v, start):
    """The same in float64, from the definition: each sequence by itself, of its filled positions."""
    out = []
    for query, keys, values, last in zip(*(np.float64(x) for x in (q, k, v)), start, strict=True):
        scores = np.einsum("kgd,skd->kgs", query[0], keys[: last + 1]) * q.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out.append(np.einsum("kgs,skd->kgd", weights, values[: last + 1])[None])
    return np.stack(out)


def draw(dtype, start, cache_len, kv_heads, group, head_dim, scale=1.0):
    """Queries, keys and values; the cache holds NaNs past the last position of each sequence."""
    keys = jax.random.split(jax.random.key(cache_len), 3)
    q = scale * jax.random.normal(keys[0], (len(start), 1, kv_heads, group, head_dim), dtype)
    k, v = (jax.random.normal(key, (len(start), cache_len, kv_heads, head_dim), dtype) for key in keys[1:])
    past = (np.arange(cache_len) > np.array(start)[:, None])[:, :, None, None]
    return q.astype(dtype), *(jnp.where(past, jnp.nan, x) for x in (k, v))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
@pytest.mark.parametrize(
    ("start", "cache_len", "kv_heads", "group", "head_dim"),
    [
        ((0, 4, 16), 17, 3, 1, 8),
        ((63, 64), 96, 1, 7, 24),
        # Two threads, and heads of the published model.
        ((299, 1500, 2047), 2048, 4, 2, 128),
    ],
)
def test_values(dtype, tolerance, start, cache_len, kv_heads, group, head_dim):
    q, k, v = draw(dtype, start, cache_len, kv_heads, group, head_dim)
    actual, calls = attend(q, k, v, jnp.array(start))
    reference = expected(q, k, v, start)
    assert actual.dtype == dtype and calls == 1
    assert np.linalg.norm(np.float64(actual) - reference) < tolerance * np.linalg.norm(reference)


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_equal_and_extreme_scores(scale):
    """All scores 0, and differences so large that the exponentials of all but one vanish."""
    q, k, v = draw(jnp.float32, (40, 7), 48, 2, 3, 16, scale)
    actual, _ = attend(q, k, v, jnp.array((40, 7)))
    np.testing.assert_allclose(actual, expected(q, k, v, (40, 7)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_devices", "cost"), [(1, None), (2, 3)])
def test_one_program_serves_every_length_on_one_cpu(num_devices, cost):
    with sharding.mesh_context(sharding.make_mesh(data=num_devices, devices=jax.devices()[:num_devices])):
        assert kv_slice_cost() == cost


def test_simulated_devices_run_what_they_stand_for():
    q, k, v = draw(jnp.float32, (9, 9), 10, 2, 1, 8)
    with sharding.mesh_context(sharding.make_mesh(data=2, devices=jax.devices()[:2])):
        assert attend(q, k, jnp.nan_to_num(v), jnp.array((9, 9)))[1] == 0
