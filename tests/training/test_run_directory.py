"""Resuming with options that change the shapes of the train state."""

import dataclasses

import pytest

from sphinx_jax.cli.train_options import Options
from sphinx_jax.errors import UserError
from sphinx_jax.training import run_directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments": "factored"}, "--moments float32, not factored"),
        ({"stage": "language"}, "--stage all, not language"),
        ({"preset": "sphinx-tiny"}, "--preset nano, not sphinx-tiny"),
    ],
)
def test_resume_with_other_options(tmp_path, changes, message):
    options = Options()
    run_directory.prepare(tmp_path / "run", dataclasses.asdict(options), overwrite=False)
    run_directory.check_resume(tmp_path / "run", options.preset, options.train, None)
    preset = changes.pop("preset", options.preset)
    train_config = dataclasses.replace(options.train, **changes)
    with pytest.raises(UserError, match=f"was started with {message}; give the same"):
        run_directory.check_resume(tmp_path / "run", preset, train_config, None)
