"""Loss, answer accuracy and gradient accumulation against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sphinx_jax.training.auxiliary_probe import aux_probe_loss
from sphinx_jax.training.step import TrainState, answer_correctness, make_train_step, next_token_losses


def test_loss_is_of_the_next_token():
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    labels = np.array([[0, 3, 0, 6, 1], [2, 0, 5, 0, 0]])
    losses, correct, loss_mask = next_token_losses(jnp.asarray(logits), jnp.asarray(labels))
    for row in range(2):
        for position in range(4):
            label = labels[row, position + 1]
            assert loss_mask[row, position] == (label != 0)
            row_logits = logits[row, position].astype(np.float64)
            expected = np.log(np.exp(row_logits).sum()) - row_logits[label]
            np.testing.assert_allclose(losses[row, position], expected, rtol=1e-5)
            assert correct[row, position] == (row_logits.argmax() == label)


def test_an_answer_is_correct_if_all_its_tokens_are():
    loss_mask = np.array([[0, 1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1]], bool)
    correct = np.array([[0, 1, 1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 1, 0, 1]], bool)
    answer_correct, exists = answer_correctness(jnp.asarray(correct), jnp.asarray(loss_mask))
    assert answer_correct[0, :5].tolist() == [False, True, False, True, False]
    assert exists[0, :5].tolist() == [False, True, True, True, False]
    assert answer_correct[1, :3].tolist() == [False, False, False]
    assert exists[1, :3].tolist() == [False, True, False]


def test_aux_probe_loss_ignores_unknown_labels():
    image_embeds = np.random.default_rng(1).normal(size=(3, 1, 4, 5)).astype(np.float32)
    probe = {
        name: jnp.asarray(np.random.default_rng(2).normal(size=(5, n)), jnp.float32)
        for name, n in [("shape", 3), ("colour", 8)]
    }
    batch = {"shape": np.array([2, -1, 0]), "colour": np.array([-1, -1, -1])}
    total, metrics = aux_probe_loss(probe, jnp.asarray(image_embeds), {k: jnp.asarray(v) for k, v in batch.items()})
    expected = []
    for row in (0, 2):
        logits = image_embeds[row].mean(axis=(0, 1)).astype(np.float64) @ probe["shape"]
        expected.append(np.log(np.exp(logits).sum()) - logits[batch["shape"][row]])
    np.testing.assert_allclose(total, np.mean(expected), rtol=1e-5)
    assert metrics["colour_accuracy"] == 0


def test_gradient_accumulation_equals_one_batch():
    """The mean of the gradients of equal microbatches is the gradient of the batch."""
    data = {"x": jax.random.normal(jax.random.key(0), (8, 3)), "y": jax.random.normal(jax.random.key(1), (8,))}

    def loss(params, batch):
        value = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        return value, {"loss": value}

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"w": jnp.array([0.5, -1.0, 2.0])}
    optimizer = optax.sgd(0.1)
    results = []
    for accum_steps in (1, 4):
        step = jax.jit(make_train_step(loss, optimizer, {"w": device}, accum_steps))
        state, metrics = step(TrainState(jnp.array(0), params, optimizer.init(params)), data, {})
        results.append((state.params["w"], metrics["loss"], metrics["grad_norm"]))
    for one, many in zip(*results, strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5)
    gradient = 2 * (data["x"] @ params["w"] - data["y"]) @ data["x"] / 8
    np.testing.assert_allclose(results[0][0], params["w"] - 0.1 * gradient, rtol=1e-5)
