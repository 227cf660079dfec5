"""The depthwise convolution against XLA's grouped one, and both weight gradients."""

import jax
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels.depthwise import _weight_gradient_grouped, depthwise_conv


def grouped(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w[:, :, None], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=x.shape[-1]
    )


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("k", "height", "width"), [(3, 8, 5), (7, 9, 4), (1, 3, 3)])
def test_values_and_gradients(monkeypatch, platform, k, height, width):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    rng = np.random.default_rng(k)
    x = rng.normal(size=(2, height, width, 6)).astype(np.float32)
    w = rng.normal(size=(k, k, 6)).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)

    @jax.jit
    def both(x, w):
        (ours, pull), (expected, pull_expected) = jax.vjp(depthwise_conv, x, w), jax.vjp(grouped, x, w)
        dx, dw = pull(cotangent)
        dx_expected, dw_expected = pull_expected(cotangent)
        on_gpu = _weight_gradient_grouped(x, cotangent, w)
        return (ours, dx, dw, on_gpu), (expected, dx_expected, dw_expected, dw_expected)

    for ours, expected in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=5e-5)
