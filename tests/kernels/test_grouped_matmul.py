"""The grouped product against a plain numpy loop, its gradients against a dense product, at awkward counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sphinx_jax.kernels.grouped_matmul import block_rows, grouped_matmul

COUNTS = {
    "even": [16, 16, 16, 16],
    "one group empty": [30, 0, 21, 13],
    "all rows in one group": [0, 64, 0, 0],
    "no multiple of a block": [1, 3, 57, 3],
    "one row": [0, 0, 1, 0],
    "rows left over": [5, 6, 7, 8],
}


def dense(x, w, sizes):
    """Every row times every group's matrix, the wrong ones masked away."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    mask = np.zeros((x.shape[0], len(sizes)), np.float32)
    mask[np.arange(len(group)), group] = 1
    return jnp.einsum("rg,ri,gio->ro", mask, x, w)


@pytest.mark.parametrize("sizes", COUNTS.values(), ids=COUNTS.keys())
def test_product_and_gradients(sizes):
    rows = 1 if sum(sizes) == 1 else 64
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (rows, 12)), jax.random.normal(keys[1], (4, 12, 10))
    dy = jax.random.normal(keys[2], (rows, 10))
    expected, pull_expected = jax.vjp(lambda x, w: dense(x, w, sizes), x, w)
    actual, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes)), x, w)
    loop = np.zeros((rows, 10), np.float64)
    row = 0
    for group, size in enumerate(sizes):
        loop[row : row + size] = np.asarray(x[row : row + size], np.float64) @ np.asarray(w[group], np.float64)
        row += size
    np.testing.assert_allclose(actual, loop, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(pull(dy), pull_expected(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_against_float64():
    sizes = [100, 0, 150, 6]
    x = jax.random.normal(jax.random.key(0), (256, 64), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (4, 64, 32), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(2), (256, 32), jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes)), x, w)
    dx, dw = pull(dy)
    x, w, dy, y, dx, dw = (np.asarray(a, np.float64) for a in (x, w, dy, y, dx, dw))
    close = lambda ours, theirs: np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)
    start = 0
    for group, size in enumerate(sizes):
        part = slice(start, start + size)
        assert close(y[part], x[part] @ w[group])
        assert close(dx[part], dy[part] @ w[group].T)
        assert close(dw[group], x[part].T @ dy[part])
        start += size


@pytest.mark.parametrize("rows", [1, 16, 100, 1000, 100_000])
def test_blocks_waste_little(rows):
    """Half a block a group is wasted on average: at most an eighth of the rows, once there are enough of them."""
    block = block_rows(rows, 8)
    assert block & (block - 1) == 0
    if rows >= 1000:
        assert 8 * block / 2 <= rows / 8
