"""Weight-only quantization against numpy, and experts with quantized weights."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sphinx_jax.kernels import moe, quantized_matmul
from sphinx_jax.kernels.linear import dot, matmul
from sphinx_jax.kernels.quantized import quantize

NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
"""QLoRA's sixteen values (arXiv:2305.14314, appendix E)."""

Q4_K = {"normal": 0.0718, "heavy-tailed": 0.0873}
"""Relative errors of llama.cpp's format of 4.5 bits on the matrices below, by a restatement of its search in numpy."""


def quantize_and_dequantize(weights, axis, dtype):
    """numpy: rounded to int8, or from the bytes of int4."""
    if dtype == "int4":
        return dequantized_int4(quantize(jnp.asarray(weights), dtype, axis), axis)
    scales = (np.abs(weights).max(axis=axis, keepdims=True) / np.float32(127)).astype(ml_dtypes.bfloat16)
    scales = scales.astype(np.float32)
    steps = np.divide(weights, scales, out=np.zeros_like(weights), where=scales > 0)
    return np.clip(np.round(steps), -127, 127) * scales


def parts_of_int4(quantized, axis):
    """numpy: of each weight the value, and the step and the zero point in the weights' unit."""
    packed = np.asarray(quantized.values)
    # The first output of a byte is in the low four bits.
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.int32)
    values = np.where(pairs > 7, pairs - 16, pairs)

    def spread(array):
        return np.repeat(np.asarray(array, np.float32), values.shape[axis] // array.shape[axis], axis=axis)

    step = 16 * spread(quantized.scales) * spread(quantized.steps)
    return values, step, step * spread(quantized.zeros) / 16


def dequantized_int4(quantized, axis):
    values, step, zero = parts_of_int4(quantized, axis)
    return step * values - zero


def relative_error(actual, expected):
    return np.linalg.norm(np.float64(actual) - expected) / np.linalg.norm(expected)


@pytest.fixture
def weights():
    """Normal, with groups of zeros."""
    weights = np.random.default_rng(0).normal(size=(128, 64, 128)).astype(np.float32)
    weights[:64, :, :3] = 0
    return weights


def stored_bits(quantized):
    """Of a weight."""
    return 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(quantized)) / np.prod(quantized.shape)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_int8(weights, axis):
    actual = quantize(jnp.asarray(weights), "int8", axis)
    expected = quantize_and_dequantize(weights, axis, "int8")
    np.testing.assert_array_equal(actual.astype(jnp.float32), expected)
    assert relative_error(expected, weights) < 0.01
    assert actual.shape == weights.shape
    assert stored_bits(actual) == 8 + 16 / weights.shape[axis]


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_int4(weights, axis):
    """Groups of zeros stay zero, and every value is that of the sixteen which is nearest to its weight."""
    quantized = quantize(jnp.asarray(weights), "int4", axis)
    actual = np.asarray(quantized.astype(jnp.float32))
    np.testing.assert_allclose(actual, dequantized_int4(quantized, axis), rtol=1e-6, atol=1e-6)
    if axis != -1:
        np.testing.assert_array_equal(actual[weights == 0], 0)
    _, step, zero = parts_of_int4(quantized, axis)
    error = np.abs(actual - weights)
    for value in range(-8, 8):
        assert np.all(error <= np.abs(step * value - zero - weights) + 1e-5)
    assert quantized.shape == weights.shape
    assert stored_bits(quantized) == 4 + 16 / 32 + 16 / weights.shape[axis]


def test_int4_needs_an_even_number_of_outputs():
    with pytest.raises(ValueError, match="3 outputs are odd"):
        quantize(jnp.ones((64, 3)), "int4", -2)


def test_int4_of_uncommon_groups():
    """Constants, tiny and huge weights, an offset of many times the spread, an outlier, zeros."""
    normal = np.random.default_rng(0).normal(size=64).astype(np.float32)
    outlier = np.where(np.arange(64) == 5, 50, normal).astype(np.float32)
    constant = np.full(64, 3)
    columns = (constant, -constant, 1e-30 * normal, 1e15 * normal, 100 + normal, normal, outlier, 0 * normal)
    weights = np.stack(columns, axis=1).astype(np.float32)
    actual = np.asarray(quantize(jnp.asarray(weights), "int4", -2).astype(jnp.float32))
    # In the worst place, of the largest weight: half a step of a fifteenth, and the rounding of steps and zero points.
    assert np.all(np.abs(actual - weights).max(0) <= 0.07 * np.abs(weights).max(0))
    np.testing.assert_allclose(actual[:, :2], weights[:, :2], rtol=0.01)


def round_to_nf4(weights):
    """Groups of 64 along the last axis, with an absolute maximum of 32 bits for each: 4.5 bits a weight."""
    groups = weights.reshape(-1, 64)
    scale = np.abs(groups).max(axis=1, keepdims=True)
    code = np.array(NF4, np.float32)
    return (code[np.abs(groups[..., None] / scale[..., None] - code).argmin(-1)] * scale).reshape(weights.shape)


@pytest.mark.parametrize("distribution", ["normal", "heavy-tailed"])
def test_int4_error_is_at_most_that_of_other_formats(distribution):
    """Of 4.5 bits each: gguf's Q4_0 by its own package, NF4, and Q4_K. A sample's error varies by a thousandth."""
    gguf = pytest.importorskip("gguf", reason="the extra parity has it")
    random = np.random.default_rng(0)
    size = 64, 4096
    weights = np.float32(random.normal(size=size) if distribution == "normal" else random.standard_t(4, size=size))
    ours = relative_error(quantize(jnp.asarray(weights.T), "int4", -2).astype(jnp.float32).T, weights)
    kind = gguf.GGMLQuantizationType.Q4_0
    assert ours < 0.85 * relative_error(gguf.dequantize(gguf.quantize(weights, kind), kind), weights)
    assert ours < 0.85 * relative_error(round_to_nf4(weights), weights)
    assert ours <= Q4_K[distribution]


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
    for module in (moe, quantized_matmul):
        monkeypatch.setattr(module, "fuses_dequantization", lambda w: implementation == "dense")
    function = functools.partial(moe.moe_ffn, implementation=implementation)
    actual = jax.jit(function)(x, experts, weights, *quantized)
    gate_up = np.einsum("td,edgh->tegh", np.float64(x), quantize_and_dequantize(w_in, -3, dtype))
    hidden = gate_up[:, :, 0] / (1 + np.exp(-gate_up[:, :, 0])) * gate_up[:, :, 1]
    out = np.einsum("teh,ehd->ted", hidden, quantize_and_dequantize(w_out, -2, dtype))
    expected = np.sum(np.take_along_axis(out, experts[..., None], axis=1) * weights[..., None], axis=1)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize(
    ("product", "tokens", "fused"), [(matmul, 1, False), (dot, 1, False), (matmul, 3, False), (matmul, 3, True)]
)
def test_attention_projections(monkeypatch, product, dtype, tokens, fused):
    """A matrix with several output dimensions, and one with several inputs, of which the last is in groups.

    `fused`: in the operations of a program with `fused_operands` for a GPU.
    """
    monkeypatch.setattr(quantized_matmul, "fuses_dequantization", lambda w: fused)
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
