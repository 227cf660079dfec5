"""Loss, answers and accumulation against plain numpy, and a step on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sphinx_jax.training.auxiliary_probe import probe_losses
from sphinx_jax.training.step import TrainState, answers, make_train_step, next_tokens


def test_next_tokens_is_shifted_by_one():
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    labels = np.array([[0, 3, 0, 6, 1], [2, 0, 5, 0, 0]])
    losses, right, counted = next_tokens(jnp.asarray(logits), jnp.asarray(labels))
    for row in range(2):
        for position in range(4):
            label = labels[row, position + 1]
            assert counted[row, position] == (label != 0)
            scores = logits[row, position].astype(np.float64)
            expected = np.log(np.exp(scores).sum()) - scores[label]
            np.testing.assert_allclose(losses[row, position], expected, rtol=1e-5)
            assert right[row, position] == (scores.argmax() == label)


def test_an_answer_is_right_when_all_its_tokens_are():
    counted = np.array([[0, 1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1]], bool)
    right = np.array([[0, 1, 1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 1, 0, 1]], bool)
    correct, exists = answers(jnp.asarray(right), jnp.asarray(counted))
    assert correct[0, :5].tolist() == [False, True, False, True, False]
    assert exists[0, :5].tolist() == [False, True, True, True, False]
    assert correct[1, :3].tolist() == [False, False, False]
    assert exists[1, :3].tolist() == [False, True, False]


def test_attribute_loss_ignores_the_unknown():
    words = np.random.default_rng(1).normal(size=(3, 1, 4, 5)).astype(np.float32)
    probe = {
        name: np.random.default_rng(2).normal(size=(5, n)).astype(np.float32)
        for name, n in [("shape", 3), ("colour", 8)]
    }
    batch = {"shape": np.array([2, -1, 0]), "colour": np.array([-1, -1, -1])}
    total, metrics = probe_losses(probe, jnp.asarray(words), {k: jnp.asarray(v) for k, v in batch.items()})
    expected = []
    for row in (0, 2):
        scores = words[row].mean(axis=(0, 1)).astype(np.float64) @ probe["shape"]
        expected.append(np.log(np.exp(scores).sum()) - scores[batch["shape"][row]])
    np.testing.assert_allclose(total, np.mean(expected), rtol=1e-5)
    assert metrics["colour_accuracy"] == 0


def test_accumulation_equals_one_large_batch():
    """Parts of equal weight: the mean of their gradients is the whole batch's gradient."""
    data = {"x": jax.random.normal(jax.random.key(0), (8, 3)), "y": jax.random.normal(jax.random.key(1), (8,))}

    def loss(params, batch):
        value = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        return value, {"loss": value}

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"w": jnp.array([0.5, -1.0, 2.0])}
    optimizer = optax.sgd(0.1)
    results = []
    for parts in (1, 4):
        step = jax.jit(make_train_step(loss, optimizer, {"w": device}, parts))
        state, metrics = step(TrainState(jnp.array(0), params, optimizer.init(params)), data)
        results.append((state.params["w"], metrics["loss"], metrics["grad_norm"]))
    for one, many in zip(*results, strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5)
    gradient = 2 * (data["x"] @ params["w"] - data["y"]) @ data["x"] / 8
    np.testing.assert_allclose(results[0][0], params["w"] - 0.1 * gradient, rtol=1e-5)
