"""Attention against plain numpy, one query at a time."""

import numpy as np
import pytest

from sphinx_jax.kernels.attention import attention


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
