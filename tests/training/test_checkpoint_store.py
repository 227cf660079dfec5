"""What a user reads when a checkpoint cannot be written."""

import subprocess

import jax.numpy as jnp
import pytest

from sphinx_jax.errors import UserError
from sphinx_jax.training.checkpoint_store import CheckpointStore
from sphinx_jax.training.step import TrainState
from tests.cluster.conftest import require


@pytest.mark.cluster
def test_full_disk(tmp_path):
    """TensorStore reports it as a ValueError, after `save` has returned."""
    require("mount", "mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs a file system of its own, which is not permitted: {mounted.stderr.strip()}")
    try:
        store = CheckpointStore(tmp_path / "checkpoints")
        # 4 MiB that do not compress.
        weights = jnp.sin(jnp.arange(2.0**20) ** 2)
        store.save(TrainState(jnp.zeros((), jnp.int32), {"model": {"weights": weights}}, ()), {"position": 0})
        with pytest.raises(UserError, match="cannot write a checkpoint .No space left on device.; make room"):
            store.latest()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
