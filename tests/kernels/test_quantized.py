"""Weights of few bits against numpy, and the experts that are multiplied by them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sphinx_jax.kernels.moe import moe_ffn
from sphinx_jax.kernels.quantized import quantize

LARGEST = {"int8": 127, "int4": 7}


def rounded(weights, axis, kind):
    """Numpy: every run of the `axis` scaled so that its largest is the largest integer, and rounded to integers."""
    moved = np.moveaxis(weights.astype(np.float32), axis, -1)
    runs = moved.reshape(*moved.shape[:-1], -1, 64 if kind == "int4" else moved.shape[-1])
    scales = (np.abs(runs).max(axis=-1, keepdims=True) / np.float32(LARGEST[kind])).astype(ml_dtypes.bfloat16)
    scales = scales.astype(np.float32)
    steps = np.divide(runs, scales, out=np.zeros_like(runs), where=scales > 0)
    back = np.clip(np.round(steps), -LARGEST[kind], LARGEST[kind]) * scales
    return np.moveaxis(back.reshape(moved.shape), -1, axis)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_rounding(kind, axis):
    weights = np.random.default_rng(0).normal(size=(128, 64, 128)).astype(np.float32)
    weights[:64, :, :3] = 0
    made = quantize(jnp.asarray(weights), kind, axis)
    expected = rounded(weights, axis, kind)
    np.testing.assert_array_equal(made.astype(jnp.float32), expected)
    assert np.linalg.norm(expected - weights) < (0.01 if kind == "int8" else 0.12) * np.linalg.norm(weights)
    assert made.shape == weights.shape
    bits = {"int8": 8, "int4": 4}[kind]
    groups = 1 if kind == "int8" else weights.shape[axis] // 64
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(made)) == (
        weights.size * bits // 8 + 2 * groups * weights.size // weights.shape[axis]
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_of_few_bits(kind, tokens):
    """The same as experts with the rounded weights, whichever form runs."""
    random = np.random.default_rng(1)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    x, weights = normal(tokens, 64), np.abs(normal(tokens, 2))
    w_in, w_out = normal(4, 64, 2, 128) / 8, normal(4, 128, 64) / 11
    experts = np.stack([random.permutation(4)[:2] for _ in range(tokens)]).astype(np.int32)
    few = (quantize(jnp.asarray(w_in), kind, -3), quantize(jnp.asarray(w_out), kind, -2))
    ours = jax.jit(moe_ffn)(x, experts, weights, *few)
    gate_up = np.einsum("td,edgh->tegh", x, rounded(w_in, -3, kind))
    hidden = gate_up[:, :, 0] / (1 + np.exp(-gate_up[:, :, 0])) * gate_up[:, :, 1]
    out = np.einsum("teh,ehd->ted", hidden, rounded(w_out, -2, kind))
    expected = np.sum(np.take_along_axis(out, experts[..., None], axis=1) * weights[..., None], axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
