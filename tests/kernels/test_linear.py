"""Products with one row against numpy, and what their compiled programs read and write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels import native_library, native_matvec
from sphinx_jax.kernels.linear import gathered_matvecs, matmul, matvec


def matmul_of_one_row(x, w):
    return matmul(x[None], w)[0]


@pytest.mark.parametrize("function", [matvec, matmul_of_one_row])
@pytest.mark.parametrize(("length", "dtype"), [(512, jnp.float32), (512, jnp.bfloat16), (7, jnp.float32)])
def test_values_and_gradients(function, length, dtype):
    keys = jax.random.split(jax.random.key(length), 3)
    x, w, dy = (jax.random.normal(k, s, dtype) for k, s in zip(keys, [(length,), (length, 3, 2), (3, 2)], strict=True))
    y, vjp = jax.vjp(function, x, w)
    dx, dw = vjp(dy)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    expected = (np.tensordot(x64, w64, 1), np.tensordot(w64, dy64, 2), x64[:, None, None] * dy64)
    for actual, reference in zip((y, dx, dw), expected, strict=True):
        assert actual.dtype == dtype
        tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-6
        assert np.linalg.norm(np.asarray(actual, np.float64) - reference) <= tolerance * np.linalg.norm(reference)


def test_gradients_with_many_dimensions_match_einsum():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, 3, 4), (4, 5, 6), (2, 3, 5, 6)]
    x, w, dy = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    y, vjp = jax.vjp(matmul, x, w)
    expected, vjp_expected = jax.vjp(lambda x, w: jnp.einsum("abi,icd->abcd", x, w), x, w)
    for actual, reference in zip((y, *vjp(dy)), (expected, *vjp_expected(dy)), strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-5, atol=1e-5)


def test_gathered_matvec_is_one_kernel_on_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(native_library, "has_library", lambda: False)
    shapes = (1, 512), (8, 512, 2, 1024)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    program = jax.jit(gathered_matvecs).lower(x, w, jax.ShapeDtypeStruct((1,), jnp.int32))
    program = program.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    # Not one kernel per row of the matrix, launched 512 times, and no copy of the matrix.
    assert len(list(tmp_path.glob("*.obj-file.*"))) == 1
    assert program.memory_analysis().temp_size_in_bytes < 1024


@pytest.mark.parametrize("min_bytes", [native_matvec.MIN_BYTES, 0])
def test_gathered_matvec_gradients_on_cpu(min_bytes, monkeypatch):
    """Of a batch of products, and of one: only the gradient of the stack is an array as large as the stack."""
    monkeypatch.setattr(native_matvec, "MIN_BYTES", min_bytes)
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    x, w, dy, index = draw(3, 12), draw(4, 12, 2, 10), draw(3, 2, 10), jnp.array([0, 2, 3])

    def gradients(x, w, index, dy):
        return jax.vjp(lambda x, w: gathered_matvecs(x[None], w, index[None])[0], x, w)[1](dy)

    dx, dw = jax.jit(jax.vmap(gradients, (0, None, 0, 0)))(x, w, index, dy)
    np.testing.assert_allclose(dx, np.einsum("rigo,rgo->ri", w[index], dy), rtol=1e-5, atol=1e-5)
    expected = np.zeros(dw.shape, dw.dtype)
    expected[np.arange(3), index] = np.einsum("ri,rgo->rigo", x, dy)
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-5)

    def abstract(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    args = abstract(512), abstract(8, 512, 2, 1024), jax.ShapeDtypeStruct((), jnp.int32), abstract(2, 1024)
    assert jax.jit(gradients).lower(*args).compile().memory_analysis().temp_size_in_bytes < 8 * 512 * 2 * 1024 * 4 / 4


@pytest.mark.optimized
def test_one_row_on_gpu_copies_no_weights(gpu_mesh, compile_for_gpu):
    mesh = gpu_mesh(tensor=8)

    def abstract(names, shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.named_sharding(names, shape, mesh))

    x, w = abstract((None,) * 3, (1, 1, 4096)), abstract(("embed", "kv_heads", None, None), (4096, 8, 6, 128))
    program = compile_for_gpu(mesh, matmul, x, w)
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 6 * 128 * 2 / 50
