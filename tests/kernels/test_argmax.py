"""The index of the largest logit against numpy, ties included."""

import jax.numpy as jnp
import numpy as np
import pytest

from sphinx_jax.kernels.argmax import argmax


@pytest.mark.parametrize("n", [1, 7, 48, 512])
def test_first_maximum(n):
    logits = np.random.default_rng(n).integers(0, 9, (3, 20, n)).astype(np.float32)
    logits[0, 0] = -np.inf
    np.testing.assert_array_equal(argmax(jnp.asarray(logits)), logits.argmax(axis=-1))
