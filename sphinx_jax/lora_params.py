"""Low-rank adapters as a parameter tree of their own, beside that of the model that they adapt.

A module that has a matrix `w` has its adapter as `w_lora`, with the factors `a` and `b` (`layers.LowRank`). Kept
apart, nothing of the base is differentiated, has optimizer state, or is saved with a run.
"""

from typing import Any

Params = dict[str | int, Any]

SUFFIX = "_lora"


def split(params: Params) -> tuple[Params, Params]:
    """The tree of a model with adapters as that of its base and that of the adapters, both nested alike."""
    base, adapters = {}, {}
    for key, value in params.items():
        if str(key).endswith(SUFFIX):
            adapters[key] = value
        elif isinstance(value, dict):
            base[key], inside = split(value)
            adapters |= {key: inside} if inside else {}
        else:
            base[key] = value
    return base, adapters


def join(base: Params, adapters: Params) -> Params:
    """Inverse of `split`; without adapters the base itself."""
    return base | {key: join(base[key], value) if key in base else value for key, value in adapters.items()}
