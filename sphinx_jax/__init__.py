"""SPHINX-MoE in JAX: load a model on any device mesh, ask it about pictures, train it.

model = sphinx_jax.load("runs/my-run")
model.generate(["What colour is it?"], ["shape.png"])
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx_jax.config import PRESETS, SphinxConfig, preset
    from sphinx_jax.data.conversation import Conversation
    from sphinx_jax.errors import UserError
    from sphinx_jax.sphinx import Sphinx, load

__all__ = ["PRESETS", "SHIPPED", "Conversation", "Sphinx", "SphinxConfig", "UserError", "load", "preset"]

SHIPPED = Path(__file__).parent / "shipped" / "nano"
"""A small trained checkpoint that comes with the project: it knows coloured shapes."""

_HOME = {
    "PRESETS": "config",
    "SphinxConfig": "config",
    "preset": "config",
    "Conversation": "data.conversation",
    "UserError": "errors",
    "Sphinx": "sphinx",
    "load": "sphinx",
}


def __getattr__(name: str) -> Any:
    # Every import of a module in this package runs this file: what loads slowly waits until it is used.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
