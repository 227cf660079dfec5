"""The depthwise convolution against XLA's grouped one, and both weight gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphinx_jax.kernels.depthwise import _dw_from_grouped_conv, depthwise_conv


def grouped_conv(x, w):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w[:, :, None], (1, 1), "SAME", dimension_numbers=layout, feature_group_count=x.shape[-1]
    )


@pytest.mark.parametrize(("k", "height", "width"), [(3, 8, 5), (7, 9, 4), (1, 3, 3)])
def test_values_and_gradients(k, height, width):
    rng = np.random.default_rng(k)
    x = rng.normal(size=(2, height, width, 6)).astype(np.float32)
    w = rng.normal(size=(k, k, 6)).astype(np.float32)
    dy = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    @jax.jit
    def both(x, w):
        (y, vjp), (expected, vjp_expected) = jax.vjp(depthwise_conv, x, w), jax.vjp(grouped_conv, x, w)
        dx, dw = vjp(dy)
        dx_expected, dw_expected = vjp_expected(dy)
        dw_on_gpu = _dw_from_grouped_conv(x, dy, w)
        return (y, dx, dw, dw_on_gpu), (expected, dx_expected, dw_expected, dw_expected)

    for actual, expected in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=5e-5)
