"""LoRA adapters as a parameter tree of their own, separate from the base model's.

The adapter of a matrix `w` is `w_lora` in the same module, with the factors `a` and `b` (`layers.LowRank`). In a tree
of their own they alone are differentiated, have optimizer state, and are saved with a run.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

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


def num_ranks(params: Params) -> int:
    """The rank of the adapters in a model's parameters, of all together; 0 without adapters."""
    leaves: list[tuple[Any, Any]] = jax.tree_util.tree_leaves_with_path(split(params)[1])
    return next((leaf.shape[-1] for keys, leaf in leaves if keys[-1].key == "a"), 0)


def with_factors(adapters: Params, factors: Mapping[tuple[str, ...], tuple[np.ndarray, np.ndarray]]) -> Params:
    """Adapters whose first ranks are `factors`, by the path of their matrix; the other ranks stay as they are.

    Where b of the others is zero, as at the start of training, the adapters compute what the factors do.
    """

    def start(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        *path, module, which = (key.key for key in keys)
        pair = factors.get((*path, module.removesuffix(SUFFIX)))
        return leaf if pair is None else _write_first(leaf, pair["ab".index(which)])

    return jax.tree_util.tree_map_with_path(start, adapters)


def _write_first(leaf: jax.Array, factor: np.ndarray) -> jax.Array:
    """The leaf with `factor` at its first indices, same sharding."""

    def write(leaf: jax.Array, factor: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(leaf, factor.astype(leaf.dtype), (0,) * leaf.ndim)

    return jax.jit(write, donate_argnums=0, out_shardings=leaf.sharding)(leaf, factor)
