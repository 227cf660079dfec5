"""The learning rate schedule against the original's stored values."""

import numpy as np
import pytest

from sphinx_jax.training.train_config import TrainConfig, schedule

STEPS_PER_EPOCH = 1000


def learning_rate(epoch, lr, min_lr, warmup_epochs, epochs):
    steps, warmup_steps = (round(STEPS_PER_EPOCH * n) for n in (epochs, warmup_epochs))
    config = TrainConfig(steps=steps, lr=lr, min_lr=min_lr, warmup_steps=warmup_steps)
    # Step n has the learning rate of n + 1 finished steps.
    return schedule(config)(STEPS_PER_EPOCH * epoch - 1)


def test_learning_rate_matches_the_original(golden):
    for case in golden("schedule.json")["adjust_learning_rate_epoch"]["cases"]:
        for epoch, _, lr, _ in case["values"]:
            # After the last epoch the original's cosine increases again; training ends there.
            if epoch <= case["args"]["epochs"]:
                actual = learning_rate(epoch, **case["args"])
                np.testing.assert_allclose(actual, lr, rtol=1e-5, atol=1e-9, err_msg=str((epoch, case["args"])))


@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5])
def test_learning_rate_ends_at_the_minimum(warmup_epochs):
    assert learning_rate(3.0, 1.0, 0.1, warmup_epochs, 3.0) == pytest.approx(0.1)


def test_run_shorter_than_the_warmup_ends_within_it():
    assert schedule(TrainConfig(steps=10, lr=1.0, warmup_steps=100))(9) == pytest.approx(0.1)
