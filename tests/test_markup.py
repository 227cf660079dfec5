"""Names that look like rich's markup are printed as they are."""

import io

import pytest
from rich.console import Console

import sharding
import sphinx_jax
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import reader
from sphinx_jax.training.metrics import RunLog


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=300, color_system=None)


def test_progress_of_loading(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "Console", lambda stderr: terminal)
    (tmp_path / "run [red] 1").symlink_to(sphinx_jax.SHIPPED)
    checkpoints.load(tmp_path / "run [red] 1", sharding.make_mesh(), "float32")
    assert "loading run [red] 1" in terminal.file.getvalue()


def test_training_log(terminal, tmp_path):
    """Held-out metrics are named by the data."""
    metrics = {"loss": 1.0, "accuracy": 0.5, "balance_loss": 1.0, "grad_norm": 1.0, "lr": 1e-3}
    with RunLog(tmp_path, 10, console=terminal) as log:
        log.write(1, metrics | {"held_out": {"[red]colour[/red]": 0.5}})
    assert "[red]colour[/red] 0.500" in terminal.file.getvalue()
