"""The product of one row against numpy, and what its program for a GPU writes to memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sphinx_jax.kernels.linear import gathered_matvec, matmul, matvec

one_row = lambda x, w: matmul(x[None], w)[0]


@pytest.mark.parametrize("form", [matvec, one_row])
@pytest.mark.parametrize(("length", "dtype"), [(512, jnp.float32), (512, jnp.bfloat16), (7, jnp.float32)])
def test_values_and_gradients(form, length, dtype):
    keys = jax.random.split(jax.random.key(length), 3)
    x, w, dy = (jax.random.normal(k, s, dtype) for k, s in zip(keys, [(length,), (length, 3, 2), (3, 2)], strict=True))
    y, pull = jax.vjp(form, x, w)
    dx, dw = pull(dy)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    expected = (np.tensordot(x64, w64, 1), np.tensordot(w64, dy64, 2), x64[:, None, None] * dy64)
    for ours, theirs in zip((y, dx, dw), expected, strict=True):
        assert ours.dtype == dtype
        tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-6
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) <= tolerance * np.linalg.norm(theirs)


def test_gradients_of_many_dimensions_are_those_of_einsum():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, 3, 4), (4, 5, 6), (2, 3, 5, 6)]
    x, w, dy = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    y, pull = jax.vjp(matmul, x, w)
    expected, pull_expected = jax.vjp(lambda x, w: jnp.einsum("abi,icd->abcd", x, w), x, w)
    for ours, theirs in zip((y, *pull(dy)), (expected, *pull_expected(dy)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_matrix_chosen_from_a_stack_is_read_by_one_kernel_on_a_cpu(tmp_path):
    shapes = (512,), (8, 512, 2, 1024)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    program = jax.jit(gathered_matvec).lower(x, w, jax.ShapeDtypeStruct((), jnp.int32))
    program = program.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    # Not one for each of its lines, started 512 times, and no copy of the matrix.
    assert len(list(tmp_path.glob("*.obj-file.*"))) == 1
    assert program.memory_analysis().temp_size_in_bytes < 1024


def test_gradients_of_chosen_matrices_on_a_cpu():
    """Of several products at once, and of one: no array is as large as the stack but its gradient."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    x, w, dy, index = draw(3, 12), draw(4, 12, 2, 10), draw(3, 2, 10), np.array([0, 2, 3])
    pull = lambda x, w, index, dy: jax.vjp(lambda x, w: gathered_matvec(x, w, index), x, w)[1](dy)
    dx, dw = jax.jit(jax.vmap(pull, (0, None, 0, 0)))(x, w, index, dy)
    np.testing.assert_allclose(dx, np.einsum("rigo,rgo->ri", w[index], dy), rtol=1e-5, atol=1e-5)
    expected = np.zeros_like(dw)
    expected[np.arange(3), index] = np.einsum("ri,rgo->rigo", x, dy)
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-5)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    args = of(512), of(8, 512, 2, 1024), jax.ShapeDtypeStruct((), jnp.int32), of(2, 1024)
    assert jax.jit(pull).lower(*args).compile().memory_analysis().temp_size_in_bytes < 8 * 512 * 2 * 1024 * 4 / 4


def test_one_row_on_a_gpu_writes_nothing_of_the_size_of_the_weights(gpu_mesh, compile_for_gpu):
    mesh = gpu_mesh(tensor=8)
    at = lambda names, shape: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=sharding.named_sharding(names, shape, mesh)
    )
    x, w = at((None,) * 3, (1, 1, 4096)), at(("embed", "kv_heads", None, None), (4096, 8, 6, 128))
    program = compile_for_gpu(mesh, matmul, x, w)
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 6 * 128 * 2 / 50
