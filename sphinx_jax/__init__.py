"""SPHINX-MoE in JAX: load a model on any device mesh, ask it about images, train it.

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
"""A small trained checkpoint that comes with the project; it answers questions about coloured shapes."""

_MODULES = {
    "PRESETS": "config",
    "SphinxConfig": "config",
    "preset": "config",
    "Conversation": "data.conversation",
    "UserError": "errors",
    "Sphinx": "sphinx",
    "load": "sphinx",
}


def __getattr__(name: str) -> Any:
    # Importing any module of the package runs this file: slow imports are deferred until first use.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
