"""Products with quantized weights in programs whose operands are fused, against float64 of the dequantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels.linear import dot
from sphinx_jax.kernels.moe import moe_ffn
from sphinx_jax.kernels.quantized import quantize

pytestmark = pytest.mark.gpu

KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])
ROWS = pytest.mark.parametrize("rows", [1, 4, 16, 64])


def compiled(function, *args):
    """As a decode step of quantized weights."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sharding.Program(function, fused_operands=True).compile(args, mesh)(*args)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / shape[-2] ** 0.5, jnp.bfloat16)


def is_close(actual, expected):
    return np.linalg.norm(np.float64(actual) - expected) <= 1e-2 * np.linalg.norm(expected)


@KINDS
@ROWS
@pytest.mark.parametrize("heads", [1, 16])
def test_projections(kind, rows, heads):
    """A matrix with one scale for each output, and one with scales for each head."""
    x, w = draw(0, rows, 2048), quantize(draw(1, heads, 2048 // heads, 3072), kind, -2)
    w = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), w)
    assert is_close(compiled(dot, x, w), np.float64(x) @ np.float64(w.astype(jnp.float32)))


@KINDS
@ROWS
def test_experts(kind, rows, moe_reference):
    x, random = draw(0, rows, 1024), np.random.default_rng(rows)
    w_in, w_out = draw(1, 8, 1024, 2, 1536), draw(2, 8, 1536, 1024)
    quantized = quantize(w_in, kind, -3), quantize(w_out, kind, -2)
    experts = jnp.asarray(np.stack([random.permutation(8)[:2] for _ in range(rows)]), jnp.int32)
    weights = jnp.asarray(random.random((rows, 2)), jnp.bfloat16)
    expected = moe_reference(x, experts, weights, *(np.asarray(w.astype(jnp.float32)) for w in quantized))
    assert is_close(compiled(moe_ffn, x, experts, weights, *quantized), expected)
