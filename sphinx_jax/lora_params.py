"""LoRA adapters as a parameter tree of their own, separate from the base model's.

The adapter of a matrix `w` is `w_lora` in the same module, with the factors `a` and `b` (`layers.LowRank`). In a tree
of their own they alone are differentiated, have optimizer state, and are saved with a run.
"""

from typing import Any

Params = dict[Any, Any]

SUFFIX = "_lora"


def split(params: Params) -> tuple[Params, Params]:
    """(base, adapters): the parameters of an adapted model as two trees of the same nesting."""
    base: Params = {}
    adapters: Params = {}
    for key, value in params.items():
        if str(key).endswith(SUFFIX):
            adapters[key] = value
        elif isinstance(value, dict):
            base[key], nested = split(value)
            adapters |= {key: nested} if nested else {}
        else:
            base[key] = value
    return base, adapters


def join(base: Params, adapters: Params) -> Params:
    """The inverse of `split`; `base` itself without adapters."""
    return base | {key: join(base[key], value) if key in base else value for key, value in adapters.items()}
