"""The learning rate schedule against the original's stored values."""

import numpy as np
import pytest

from sphinx_jax.training.optimizer import cosine_with_warmup


def test_learning_rate_matches_the_original(golden):
    for case in golden("schedule.json")["adjust_learning_rate_epoch"]["cases"]:
        for epoch, _, lr, _ in case["values"]:
            # Past the last epoch the original's cosine turns up again; training ends there.
            if epoch <= case["args"]["epochs"]:
                ours = cosine_with_warmup(epoch, **case["args"])
                np.testing.assert_allclose(ours, lr, rtol=1e-5, atol=1e-9, err_msg=str((epoch, case["args"])))


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_learning_rate_ends_at_the_minimum(warmup):
    assert cosine_with_warmup(3.0, lr=1.0, min_lr=0.1, warmup_epochs=warmup, epochs=3.0) == pytest.approx(0.1)
