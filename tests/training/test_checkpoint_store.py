"""What a user reads when a checkpoint cannot be written."""

import jax.numpy as jnp
import pytest

from sphinx_jax.errors import UserError
from sphinx_jax.training.checkpoint_store import CheckpointStore
from sphinx_jax.training.step import TrainState
from tests.instruments.small_disk import small_disk


@pytest.mark.cluster
def test_full_disk(tmp_path):
    """TensorStore reports it as a ValueError, after `save` has returned."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        store = CheckpointStore(disk / "checkpoints")
        # 4 MiB that do not compress.
        weights = jnp.sin(jnp.arange(2.0**20) ** 2)
        store.save(TrainState(jnp.zeros((), jnp.int32), {"model": {"weights": weights}}, ()), {"position": 0})
        with pytest.raises(UserError, match=r"cannot write a checkpoint \(No space left on device\); make room"):
            store.latest()
