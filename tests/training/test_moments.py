"""Each kind of moments against a plain reference over four steps, its memory, and its convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sharding
from sphinx_jax.training.checkpoint_store import CheckpointStore
from sphinx_jax.training.moments import MOMENTS, scale_by_moments
from sphinx_jax.training.optimizer import adamw
from sphinx_jax.training.train_state import abstract_state, init_state

B1, B2 = 0.9, 0.95
SHAPES = {"matrix": (2, 128, 130), "odd": (3, 96, 131), "bias": (50,)}


def gradients(steps=4):
    """Of magnitudes from 1e-6 to 1, a fifth of them zero."""
    rng = np.random.default_rng(0)

    def draw(shape):
        values = rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 0, shape) * (rng.random(shape) > 0.2)
        return values.astype(np.float32)

    for _ in range(steps):
        yield {name: draw(shape) for name, shape in SHAPES.items()}


def update_directions(moments):
    transform = scale_by_moments(moments, B1, B2)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state, update = transform.init(params), jax.jit(transform.update)
    for grads in gradients():
        directions, state = update(grads, state, params)
        yield directions


def assert_close(actual, expected):
    """Except for 1 %: a value midway between two bfloat16 numbers may be rounded either way."""
    off = np.abs(np.asarray(actual) - expected) > 1e-3 * np.abs(expected) + 1e-5
    assert off.mean() < 0.01


def test_factored_against_numpy():
    """Row and column means of g^2 for the large array, g^2 for the others; then a running mean of the scaled g."""
    second, mean = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    rows, columns = np.zeros((2, 128, 1)), np.zeros((2, 1, 130))
    for t, (grads, actual) in enumerate(zip(gradients(), update_directions("factored"), strict=True), 1):
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
            assert_close(actual[name], exact / (1 - B1**t))
            mean[name] = exact.astype(jnp.bfloat16).astype(np.float64)


def test_factored_against_optax():
    """optax's Adafactor has another decay; with ours, and a running mean of the scaled gradients, steps are equal."""
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    scale = optax.scale_by_factored_rms(decay_rate_fn=lambda i, _: 1 - (1 - B2) / (1 - B2 ** (i + 1)))
    state, mean = scale.init(params), {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for t, (grads, actual) in enumerate(zip(gradients(), update_directions("factored"), strict=True), 1):
        scaled, state = scale.update(grads, state, params)
        for name in SHAPES:
            exact = B1 * mean[name] + (1 - B1) * np.asarray(scaled[name])
            assert_close(actual[name], exact / (1 - B1**t))
            mean[name] = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32)
    # An array that is not factored has Adam's second moment.
    adam = optax.scale_by_rms(decay=B2, bias_correction=True, eps=0)
    state = adam.init(params)
    for grads, actual in zip(gradients(1), update_directions("factored"), strict=False):
        expected, state = adam.update(grads, state, params)
        np.testing.assert_allclose(actual["bias"], np.nan_to_num(expected["bias"]), rtol=1e-4)


MATRICES = {"w": (("layers", "embed", "mlp"), (2, 128, 512)), "head": (("embed", "vocab"), (256, 132))}


@pytest.fixture(scope="module")
def states():
    """(moments, mesh) -> abstract and concrete train state of two matrices."""

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
    abstract, concrete = states(moments, fsdp=2, tensor=4)
    for expected, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    elements = (2 * 128 * 512 + 256 * 132) / 8
    means = 4 * (2 * 128 / 2 + 2 * 512 / 4 + 256 / 2 + 132 / 4)
    expected = {"float32": 8 * elements, "bfloat16": 4 * elements, "factored": 2 * elements + means}
    assert sharding.bytes_per_device(abstract.opt_state) == pytest.approx(expected[moments], abs=64)


def test_restored_on_another_mesh(states, tmp_path):
    _, saved = states("factored", fsdp=2, tensor=4)
    saved = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape).astype(x.dtype), saved)
    store = CheckpointStore(tmp_path)
    store.save(saved._replace(step=jnp.array(3)), {"position": 5})
    target, _ = states("factored", fsdp=8)
    restored, position = store.restore(target)
    store.close()
    assert position == {"position": 5}
    leaves = (jax.tree.leaves(state.opt_state) for state in (saved, target, restored))
    for expected, abstract, leaf in zip(*leaves, strict=True):
        np.testing.assert_array_equal(expected, leaf)
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)


def test_all_converge_alike():
    """Regression to a small random network, 100 steps: within a tenth of the loss with float32 moments."""

    def weights(seed):
        init = jax.nn.initializers.lecun_normal()
        first, second = jax.random.split(jax.random.key(seed))
        return {"in": {"kernel": init(first, (64, 128))}, "out": {"kernel": init(second, (128, 128))}}

    def network(params):
        return jnp.tanh(x @ params["in"]["kernel"]) @ params["out"]["kernel"]

    def loss(params):
        return jnp.mean((network(params) - target) ** 2)

    def fitted_loss(moments):
        optimizer = adamw(lambda step: 1e-2 * (1 - step / 100), moments=moments)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = weights(0)
        (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=100))((params, optimizer.init(params)))
        return float(loss(params))

    x = jax.random.normal(jax.random.key(9), (256, 64)) * 2
    target = network(weights(7))
    exact = fitted_loss("float32")
    assert exact < loss(weights(0)) / 20
    for moments in ("bfloat16", "factored"):
        assert fitted_loss(moments) == pytest.approx(exact, rel=0.1), moments
