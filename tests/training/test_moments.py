"""Each kind of moments against a plain reference over four steps, its memory, and its convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from sphinx_jax.training.moments import MOMENTS, blocks_of, decode, encode, scale_by_moments
from sphinx_jax.training.optimizer import adamw
from sphinx_jax.training.train_state import CheckpointStore, abstract_state, init_state

B1, B2 = 0.9, 0.95
SHAPES = {"matrix": (2, 128, 130), "odd": (3, 96, 131), "bias": (50,)}


def gradients(steps=4):
    """Of magnitudes from 1e-6 to 1, some of them zero at times."""
    chance = np.random.default_rng(0)
    for _ in range(steps):
        draw = lambda s: chance.normal(size=s) * 10.0 ** chance.uniform(-6, 0, s) * (chance.random(s) > 0.2)
        yield {name: draw(shape).astype(np.float32) for name, shape in SHAPES.items()}


def ours(moments):
    transform = scale_by_moments(moments, B1, B2)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state, update = transform.init(params), jax.jit(transform.update)
    for grads in gradients():
        directions, state = update(grads, state, params)
        yield directions


def close(found, expected):
    """But for a few: what lies half way between two numbers that are kept may be rounded either way."""
    off = np.abs(np.asarray(found) - expected) > 1e-3 * np.abs(expected) + 1e-5
    assert off.mean() < 0.01


def table(signed):
    """The data type as a table: where each code begins, ascending, and what it stands for."""
    parts = [np.linspace(0.1, 1, 2 ** (n if signed else n + 1) + 1) * 10.0 ** (n - 6) for n in range(7)]
    begins = np.concatenate([part[:-1] for part in parts])
    values = np.concatenate([(part[:-1] + part[1:]) / 2 for part in parts])
    return begins, np.append(values[:-1], 1.0)


def rounded(x, dim, block, signed):
    """What is kept of x: its blocks one after another."""
    begins, values = table(signed)
    out = np.moveaxis(x.copy(), dim, -1)
    rows = out.reshape(-1, block)
    for row in rows:
        share = np.abs(row) / max(np.abs(row).max(), 1e-38)
        found = values[np.maximum(np.searchsorted(begins, share, side="right") - 1, 0)]
        row[:] = np.abs(row).max() * (np.where(share < 1e-7, 0, np.sign(row) * found) if signed else found)
    return np.moveaxis(rows.reshape(out.shape), -1, dim)


def test_int8_against_numpy():
    first, second = ({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()} for _ in range(2))
    for t, (grads, found) in enumerate(zip(gradients(), ours("int8"), strict=True), 1):
        for name, g in grads.items():
            m, v = B1 * first[name] + (1 - B1) * g, B2 * second[name] + (1 - B2) * g**2
            expected = m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + 1e-8)
            close(found[name], expected)
            assert np.abs(found[name]).max() < 5
            if blocks := blocks_of(g.shape):
                m, v = rounded(m, *blocks, True), rounded(v, *blocks, False)
            first[name], second[name] = m, v


def test_every_code_comes_back():
    """255 values signed, 254 unsigned, by the table; zero is one of the first only. The largest is exact."""
    for signed, dtype in ((True, jnp.int8), (False, jnp.uint8)):
        values = table(signed)[1]
        assert len(values) == (127 if signed else 254)
        wanted = np.concatenate([-values[::-1], [0], values]) if signed else values
        wanted = jnp.asarray(np.pad(wanted, (0, 1), constant_values=1), jnp.float32)
        kept = encode(wanted * 3, jnp.array([3.0]), 0, len(wanted), signed)
        assert kept.code.dtype == dtype and len(np.unique(kept.code)) == len(wanted) - 1
        np.testing.assert_allclose(decode(kept, 0, len(wanted)), wanted * 3, rtol=1e-5)


def test_factored_against_numpy():
    """Means of g^2 by row and by column of the large array, g^2 itself of the others, the mean of what they scale."""
    zeros = lambda: {name: np.zeros(shape) for name, shape in SHAPES.items()}
    second, mean = zeros(), zeros()
    rows, columns = np.zeros((2, 128, 1)), np.zeros((2, 1, 130))
    for t, (grads, found) in enumerate(zip(gradients(), ours("factored"), strict=True), 1):
        for name, g in grads.items():
            g = g.astype(np.float64)
            if name == "matrix":
                rows = B2 * rows + (1 - B2) * np.mean(g**2, axis=2, keepdims=True)
                columns = B2 * columns + (1 - B2) * np.mean(g**2, axis=1, keepdims=True)
                v = rows * columns / rows.mean(axis=1, keepdims=True)
            else:
                v = second[name] = B2 * second[name] + (1 - B2) * g**2
            scaled = g / np.sqrt(np.maximum(v / (1 - B2**t), 1e-30))
            exact = B1 * mean[name] + (1 - B1) * scaled
            close(found[name], exact / (1 - B1**t))
            mean[name] = exact.astype(jnp.bfloat16).astype(np.float64)


def test_factored_against_optax_adafactors_pieces():
    """Its own decay is another; given ours, and a mean of the scaled gradients beside it, the steps are the same."""
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    bias_corrected = lambda i, _: 1 - (1 - B2) / (1 - B2 ** (i + 1))
    scale = optax.scale_by_factored_rms(decay_rate_fn=bias_corrected)
    state, mean = scale.init(params), {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for t, (grads, found) in enumerate(zip(gradients(), ours("factored"), strict=True), 1):
        scaled, state = scale.update(grads, state, params)
        for name in SHAPES:
            exact = B1 * mean[name] + (1 - B1) * np.asarray(scaled[name])
            close(found[name], exact / (1 - B1**t))
            mean[name] = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32)
    # Where nothing is factored, it is Adam's second moment.
    adam = optax.scale_by_rms(decay=B2, bias_correction=True, eps=0)
    state = adam.init(params)
    for grads, found in zip(gradients(1), ours("factored"), strict=False):
        expected, state = adam.update(grads, state, params)
        np.testing.assert_allclose(found["bias"], np.nan_to_num(expected["bias"]), rtol=1e-4)


MATRICES = {"w": (("layers", "embed", "mlp"), (2, 128, 512)), "head": (("embed", "vocab"), (256, 132))}


@pytest.fixture(scope="module")
def states():
    """(moments, mesh) -> abstract and made train state of two matrices."""

    @functools.cache
    def make(moments, **shape):
        mesh = sharding.make_mesh(**shape)
        params = {"model": {}}
        for name, (axes, size) in MATRICES.items():
            params["model"][name] = {
                "kernel": jax.device_put(jnp.ones(size), sharding.named_sharding(axes, size, mesh))
            }
        optimizer = adamw(lambda step: 0.1, moments=moments)
        return abstract_state(params, optimizer, mesh), init_state(params, optimizer, mesh)

    return make


@pytest.mark.parametrize("moments", MOMENTS)
def test_bytes_and_shardings(states, moments):
    abstract, made = states(moments, fsdp=2, tensor=4)
    for expected, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(made), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    elements = (2 * 128 * 512 + 256 * 132) / 8
    means = 4 * (2 * 128 / 2 + 2 * 512 / 4 + 256 / 2 + 132 / 4)
    # Blocks of 64 along 512 of the one, split over 4, and along 256 of the other, split over 2.
    scales = 2 * 4 * (2 * 128 * 8 / 8 + 4 * 132 / 8)
    expected = {
        "float32": 8 * elements,
        "bfloat16": 4 * elements,
        "factored": 2 * elements + means,
        "int8": 2 * elements + scales,
    }
    assert sharding.bytes_per_device(abstract.opt_state) == pytest.approx(expected[moments], abs=64)


@pytest.mark.parametrize("moments", ["factored", "int8"])
def test_restored_on_another_mesh(states, moments, tmp_path):
    _, made = states(moments, fsdp=2, tensor=4)
    numbered = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape).astype(x.dtype), made)
    store = CheckpointStore(tmp_path)
    store.save(numbered._replace(step=jnp.array(3)), {"position": 5})
    # So many devices cut blocks of 64 apart; their scales then lie whole on each of them.
    wanted, _ = states(moments, fsdp=8)
    restored, position = store.restore(wanted)
    store.close()
    assert position == {"position": 5}
    states = (state.opt_state for state in (numbered, wanted, restored))
    for saved, target, leaf in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(saved, leaf)
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)


def test_all_converge_alike():
    """A small network fitted to another one, 100 steps: the loss of float32 moments, to a tenth."""
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape) / shape[0] ** 0.5
    network = lambda p, x: jnp.tanh(x @ p["in"]["kernel"]) @ p["out"]["kernel"]
    weights = lambda i: {"in": {"kernel": draw(i, (64, 128))}, "out": {"kernel": draw(i + 1, (128, 128))}}
    x = draw(9, (256, 64)) * 16
    loss = lambda params: jnp.mean((network(params, x) - network(weights(7), x)) ** 2)

    def fitted(moments):
        optimizer = adamw(lambda step: 1e-2 * (1 - step / 100), moments=moments)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = weights(0)
        (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=100))((params, optimizer.init(params)))
        return float(loss(params))

    exact = fitted("float32")
    assert exact < loss(weights(0)) / 20
    for moments in ("bfloat16", "factored", "int8"):
        assert fitted(moments) == pytest.approx(exact, rel=0.1), moments
