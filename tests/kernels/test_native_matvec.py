"""Products of the compiled library against float64."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels import native_library, native_matvec
from sphinx_jax.kernels.linear import dot, gathered_matvecs, matmul
from sphinx_jax.kernels.moe import moe_ffn
from sphinx_jax.kernels.quantized import quantize

NUM_MATRICES = 5

ROUNDED = 1e-4
"""Tolerance, relative by norm, of products with quantized weights in C++, which round inputs to 16 bits."""


@pytest.fixture(params=["native", "loops"])
def runs(request, monkeypatch):
    """The products in C++, and XLA's loops for a machine without a compiler."""
    monkeypatch.setattr(native_matvec, "MIN_BYTES", 0)
    if request.param == "loops":
        monkeypatch.setattr(native_library, "has_library", lambda: False)
    elif not native_library.has_library():
        pytest.skip("needs a C++ compiler: apt-get install g++")
    return request.param


def stack_of(kind, length, outputs):
    """(weights as they are stored, the same in float64)."""
    weights = jax.random.normal(jax.random.key(length), (NUM_MATRICES, length, *outputs))
    if kind == "int8 by heads":
        # Scales of the output projection of attention: one for each head and output.
        heads = quantize(weights.reshape(NUM_MATRICES, 4, length // 4, *outputs), "int8", -1 - len(outputs))
        merged = jax.tree.map(lambda array: array.reshape(NUM_MATRICES, -1, *outputs), heads)
        return merged, np.float64(heads.astype(jnp.float32)).reshape(weights.shape)
    stored = quantize(weights, kind, -1 - len(outputs)) if kind in ("int8", "int4") else weights.astype(kind)
    return stored, np.float64(stored.astype(jnp.float32))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int8 by heads", "int4"])
@pytest.mark.parametrize(("length", "outputs"), [(64, (2, 352)), (36, (10,)), (512, (2, 1024)), (1280, (40,))])
def test_products_with_matrices_of_a_stack(runs, kind, length, outputs):
    stored, exact = stack_of(kind, length, outputs)
    x = jax.random.normal(jax.random.key(1), (3, length), jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    # The last block of 256 inputs, or of a head's, is larger than the others.
    x = x.at[:, -length // 20 :].multiply(100)
    index = np.array([4, 0, 4])
    # A function of its own: jax would reuse what it traced for the other kind.
    y = jax.jit(lambda *args: gathered_matvecs(*args))(x, stored, jnp.asarray(index))
    assert y.dtype == x.dtype and y.shape == (3, *outputs)
    expected = np.einsum("ri,ri...->r...", np.float64(x), exact[index])
    tolerance = {"float32": 1e-6, "bfloat16": 4e-3}.get(kind, ROUNDED if runs == "native" else 1e-6)
    assert np.linalg.norm(np.float64(y) - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize("product", [matmul, dot])
@pytest.mark.parametrize("tokens", [1, 32, 33])
def test_projections_of_few_tokens(runs, kind, product, tokens):
    stored, exact = stack_of(kind, 64, (96,))
    x = jax.random.normal(jax.random.key(1), (tokens, 1, 64))
    y = jax.jit(lambda *args: product(*args))(x, jax.tree.map(lambda array: array[2], stored))
    expected = np.float64(x) @ exact[2]
    assert np.linalg.norm(np.float64(y) - expected) < ROUNDED * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kind", "tokens", "calls"),
    [("float32", 8, 2), ("float32", 9, 0), ("bfloat16", 32, 2), ("int8", 32, 2), ("int4", 33, 0)],
)
def test_experts_of_few_tokens(monkeypatch, kind, tokens, calls):
    monkeypatch.setattr(native_matvec, "MIN_BYTES", 0)
    if not native_library.has_library():
        pytest.skip("needs a C++ compiler: apt-get install g++")
    (w_in, exact_in), (w_out, exact_out) = stack_of(kind, 64, (2, 32)), stack_of(kind, 32, (64,))
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(tokens, 64)), jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    experts = np.stack([random.permutation(NUM_MATRICES)[:2] for _ in range(tokens)])
    weights = random.dirichlet([1, 1], tokens)
    args = x, jnp.asarray(experts), jnp.asarray(weights, x.dtype), w_in, w_out
    program = jax.jit(lambda *args: moe_ffn(*args)).lower(*args).compile()
    assert (program.as_text() or "").count('custom_call_target="sphinx_matvec"') == calls
    gate, up = np.moveaxis(np.einsum("ti,tjigo->tjgo", np.float64(x), exact_in[experts]), 2, 0)
    hidden = gate / (1 + np.exp(-gate)) * up
    expected = np.einsum("tj,tjo,tjod->td", weights, hidden, exact_out[experts])
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}.get(kind, 2 * ROUNDED)
    assert np.linalg.norm(np.float64(program(*args)) - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_inputs_of_any_size(runs, kind):
    """A large input is rounded for its own block alone, and one that is no number makes no numbers of the outputs."""
    stored, exact = stack_of(kind, 2048, (352,))
    x = np.random.default_rng(0).normal(size=(4, 2048)).astype(np.float32)
    x[0, 5], x[1], x[2, 700], x[3, 9] = 1e6, 0, np.inf, np.nan
    y = np.float64(jax.jit(lambda *args: gathered_matvecs(*args))(x, stored, jnp.arange(4)))
    expected = np.einsum("ri,rio->ro", np.float64(x[:2]), exact[:2])
    error = np.linalg.norm(y[:2] - expected, axis=1)
    assert error[0] < ROUNDED * np.linalg.norm(expected[0]) and not y[1].any()
    assert not np.isfinite(y[2:]).any()
    # Without the large input, and so without its block, the others are as exact as ever.
    x[0, 5] = 0
    y = np.float64(jax.jit(lambda *args: gathered_matvecs(*args))(x[:1], stored, jnp.arange(1)))
    rest = np.float64(x[:1]) @ exact[0]
    assert np.linalg.norm(y - rest) < ROUNDED * np.linalg.norm(rest)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_without_vector_instructions(monkeypatch, tmp_path, kind):
    """The same integers are summed on a CPU without AVX2: no bit differs."""
    compiler = next(filter(None, map(shutil.which, native_library.COMPILERS)), None)
    if compiler is None or " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a C++ compiler and a CPU with AVX2")
    monkeypatch.setattr(native_matvec, "MIN_BYTES", 0)
    stored, _ = stack_of(kind, 300, (2, 40))
    x = jax.random.normal(jax.random.key(1), (3, 300))
    index = jnp.array([4, 0, 4])
    with_vectors = jax.jit(lambda *args: gathered_matvecs(*args))(x, stored, index)
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -U__AVX2__\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    register = jax.ffi.register_ffi_target
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda name, *a, **b: register(f"{name}_{kind}", *a, **b))
    assert native_library._load.__wrapped__()
    call = jax.ffi.ffi_call
    monkeypatch.setattr(jax.ffi, "ffi_call", lambda name, *a, **b: call(f"{name}_{kind}", *a, **b))
    without = jax.jit(lambda *args: gathered_matvecs(*args))(x, stored, index)
    np.testing.assert_array_equal(with_vectors, without)


@pytest.mark.parametrize(("devices", "width", "calls"), [(1, 2048, 1), (1, 32, 0), (2, 2048, 0)])
def test_large_matrices_of_one_device_are_read_by_the_library(devices, width, calls):
    if not native_library.has_library():
        pytest.skip("needs a C++ compiler: apt-get install g++")
    x, w, index = jnp.ones((1, 512)), jax.ShapeDtypeStruct((8, 512, width), jnp.float32), jnp.zeros(1, jnp.int32)
    with sharding.mesh_context(sharding.make_mesh(tensor=devices, devices=jax.devices()[:devices])):
        # A function of its own: jax would reuse what it traced for another mesh.
        program = jax.jit(lambda *args: gathered_matvecs(*args)).lower(x, w, index).compile()
    assert (program.as_text() or "").count('custom_call_target="sphinx_matvec"') == calls
    assert devices > 1 or program.memory_analysis().temp_size_in_bytes < 512 * 2048
