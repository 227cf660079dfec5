"""Resuming with options that give the state another shape."""

import dataclasses

import pytest

from sphinx_jax.cli.train_options import Options
from sphinx_jax.errors import UserError
from sphinx_jax.training import run_directory


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"moments": "int8"}, "--moments float32, not int8"),
        ({"stage": "language"}, "--stage all, not language"),
        ({"preset": "sphinx-tiny"}, "--preset nano, not sphinx-tiny"),
    ],
)
def test_resumed_otherwise(tmp_path, other, said):
    begun = Options()
    run_directory.prepare(tmp_path / "run", dataclasses.asdict(begun), overwrite=False)
    run_directory.check_same(tmp_path / "run", dataclasses.asdict(begun))
    with pytest.raises(UserError, match=f"was begun with {said}; give the same"):
        run_directory.check_same(tmp_path / "run", dataclasses.asdict(dataclasses.replace(begun, **other)))
