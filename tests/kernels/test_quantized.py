"""Weight-only quantization against numpy, and experts with quantized weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sphinx_jax.kernels import moe
from sphinx_jax.kernels.linear import dot, matmul
from sphinx_jax.kernels.quantized import quantize

MAX_VALUE = {"int8": 127, "int4": 7}


def quantize_and_dequantize(weights, axis, dtype):
    """numpy: each group along `axis` scaled so that its largest value is the largest integer, and rounded."""
    moved = np.moveaxis(weights.astype(np.float32), axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, 64 if dtype == "int4" else moved.shape[-1])
    scales = (np.abs(groups).max(axis=-1, keepdims=True) / np.float32(MAX_VALUE[dtype])).astype(ml_dtypes.bfloat16)
    scales = scales.astype(np.float32)
    steps = np.divide(groups, scales, out=np.zeros_like(groups), where=scales > 0)
    dequantized = np.clip(np.round(steps), -MAX_VALUE[dtype], MAX_VALUE[dtype]) * scales
    return np.moveaxis(dequantized.reshape(moved.shape), -1, axis)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_rounding(dtype, axis):
    weights = np.random.default_rng(0).normal(size=(128, 64, 128)).astype(np.float32)
    weights[:64, :, :3] = 0
    actual = quantize(jnp.asarray(weights), dtype, axis)
    expected = quantize_and_dequantize(weights, axis, dtype)
    np.testing.assert_array_equal(actual.astype(jnp.float32), expected)
    assert np.linalg.norm(expected - weights) < (0.01 if dtype == "int8" else 0.12) * np.linalg.norm(weights)
    assert actual.shape == weights.shape
    bits = {"int8": 8, "int4": 4}[dtype]
    num_groups = 1 if dtype == "int8" else weights.shape[axis] // 64
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(actual)) == (
        weights.size * bits // 8 + 2 * num_groups * weights.size // weights.shape[axis]
    )


def test_a_byte_holds_two_outputs():
    integers = np.random.default_rng(2).integers(-7, 8, (64, 3, 4))
    integers[0] = 7
    packed = quantize(jnp.asarray(integers, jnp.float32), "int4", -3)
    np.testing.assert_array_equal(packed.values, integers[..., ::2] % 16 + integers[..., 1::2] % 16 * 16)
    lowest = dataclasses.replace(packed, values=jnp.full_like(packed.values, 0x88))
    np.testing.assert_array_equal(lowest.astype(jnp.float32), -8)
    with pytest.raises(ValueError, match="3 outputs are odd"):
        quantize(jnp.ones((64, 3)), "int4", -2)


def normal(random, *shape):
    return random.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize(("tokens", "implementation"), [(1, None), (5, None), (1, "dense"), (5, "dense")])
def test_quantized_experts(monkeypatch, dtype, tokens, implementation):
    """Match experts with the dequantized weights, in every implementation."""
    random = np.random.default_rng(1)
    x, weights = normal(random, tokens, 64), np.abs(normal(random, tokens, 2))
    w_in, w_out = normal(random, 4, 64, 2, 128) / 8, normal(random, 4, 128, 64) / 11
    experts = np.stack([random.permutation(4)[:2] for _ in range(tokens)]).astype(np.int32)
    quantized = (quantize(jnp.asarray(w_in), dtype, -3), quantize(jnp.asarray(w_out), dtype, -2))
    # As in a program with `fused_operands` for a GPU.
    monkeypatch.setattr(moe, "fuses_dequantization", lambda w: implementation == "dense")
    function = functools.partial(moe.moe_ffn, implementation=implementation)
    actual = jax.jit(function)(x, experts, weights, *quantized)
    gate_up = np.einsum("td,edgh->tegh", np.float64(x), quantize_and_dequantize(w_in, -3, dtype))
    hidden = gate_up[:, :, 0] / (1 + np.exp(-gate_up[:, :, 0])) * gate_up[:, :, 1]
    out = np.einsum("teh,ehd->ted", hidden, quantize_and_dequantize(w_out, -2, dtype))
    expected = np.sum(np.take_along_axis(out, experts[..., None], axis=1) * weights[..., None], axis=1)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("product", [matmul, dot])
def test_attention_projections(product, dtype, tokens):
    """A matrix with several output dimensions, and one with several inputs, of which the last is in groups."""
    random = np.random.default_rng(3)
    heads, wqkv, wo = normal(random, 1, tokens, 2 * 128), normal(random, 256, 2, 3, 8), normal(random, 2, 128, 10)
    for w, axis in ((wqkv, -4), (wo, -2)):
        merged = jax.tree.map(
            lambda array, w=w, axis=axis: array.reshape(-1, *array.shape[w.ndim + axis + 1 :]),
            quantize(jnp.asarray(w), dtype, axis),
        )
        expected = np.tensordot(np.float64(heads), quantize_and_dequantize(w, axis, dtype).reshape(merged.shape), 1)
        for kind, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
            actual = jax.jit(product)(jnp.asarray(heads, kind), merged)
            assert actual.dtype == kind and actual.shape == expected.shape
            assert np.linalg.norm(np.float64(actual) - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_gradient_of_the_input(dtype):
    """As LoRA on a quantized model needs it, also of one token."""
    random = np.random.default_rng(4)
    x, w = normal(random, 1, 128), normal(random, 128, 6)
    quantized = quantize(jnp.asarray(w), dtype, -2)
    actual = jax.jit(jax.grad(lambda x: jnp.sum(matmul(x, quantized))))(x)
    np.testing.assert_allclose(actual[0], quantize_and_dequantize(w, -2, dtype).sum(axis=1), rtol=1e-4, atol=1e-5)
