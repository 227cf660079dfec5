"""Crops, resizing and half-precision rounding, without reference data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphinx_jax.config import ClipConfig, ConvNextConfig, VisionConfig
from sphinx_jax.vision.crops import encoder_inputs, resize, to_half


def test_to_half_rounds_as_numpy_does():
    """Normal and subnormal numbers, halfway cases, zero, and both signs, inside a compiled program."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=2000), rng.normal(size=2000) * 2.0**-15, [0.0, 2.0**-24, 2.0**-25, 1 + 2.0**-11]]
    )
    x = np.concatenate([x, -x]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(to_half)(x), x.astype(np.float16).astype(np.float32))


def test_resize_preserves_constants_and_nearly_preserves_lines():
    """The weights of a new sample sum to 1, and are centred on its position."""
    line = jnp.broadcast_to(jnp.arange(40.0)[None, :, None, None], (1, 40, 40, 1))
    positions = (np.arange(25) + 0.5) * 40 / 25 - 0.5
    inside = (positions > 2) & (positions < 37)
    # Only a = -0.5 preserves lines exactly (Keys 1981); a = -0.75 is off by less than a tenth of a sample.
    np.testing.assert_allclose(np.asarray(resize(line, 25)[0, :, 0, 0])[inside], positions[inside], atol=0.1)
    np.testing.assert_allclose(resize(jnp.ones((1, 40, 40, 1)), 25), 1.0, rtol=1e-6)


@pytest.fixture
def tiny() -> VisionConfig:
    return VisionConfig(
        image_size=64,
        num_crops=5,
        clip=ClipConfig(width=16, num_layers=1, num_heads=2, patch=16, image_size=32),
        convnext=ConvNextConfig(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4), image_size=32),
        dino=None,
        qformer=None,
    )


def test_order_of_five_crops(tiny):
    """Full image, top left, top right, bottom left, bottom right; all crops of one image before the next."""
    colours = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    image = np.kron(colours, np.ones((32, 32), np.float32))[None, :, :, None] * np.ones(3, np.float32)
    inputs = encoder_inputs(jnp.concatenate([jnp.asarray(image), jnp.asarray(10 * image)]), tiny)
    for name in ("clip", "convnext"):
        middle = np.asarray(inputs[name][:, 16, 16, 0])
        np.testing.assert_allclose(middle[1:5], [1, 2, 3, 4], rtol=1e-3)
        np.testing.assert_allclose(middle[6:], [10, 20, 30, 40], rtol=1e-3)
        np.testing.assert_allclose(inputs[name][0, 4, 28], 2.0, rtol=1e-3)
        assert inputs[name].shape == (10, 32, 32, 3)


def test_quarters_for_convnext_are_not_rounded(tiny):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(1, 64, 64, 3)).astype(np.float32)
    crops = encoder_inputs(jnp.asarray(image), tiny)
    np.testing.assert_array_equal(crops["convnext"][2], image[0, :32, 32:])
    np.testing.assert_array_equal(crops["clip"], np.asarray(crops["clip"]).astype(np.float16))
    assert not np.array_equal(crops["clip"][2], image[0, :32, 32:])
