"""The place of the largest against numpy, ties included."""

import numpy as np
import pytest

from sphinx_jax.kernels.argmax import argmax


@pytest.mark.parametrize("n", [1, 7, 48, 512])
def test_first_largest(n):
    scores = np.random.default_rng(n).integers(0, 9, (3, 20, n)).astype(np.float32)
    scores[0, 0] = -np.inf
    np.testing.assert_array_equal(argmax(scores), scores.argmax(axis=-1))
