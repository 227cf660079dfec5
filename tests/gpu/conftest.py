"""Tests on a GPU: `pytest -m gpu -n 0`. They need only jax, flax and numpy."""

import jax
import pytest


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU, and -m gpu -n 0: otherwise tests run on simulated CPU devices")
