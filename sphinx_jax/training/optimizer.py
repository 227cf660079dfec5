"""AdamW as the original trains: schedule, clipping, and what decays."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Path = tuple[str | int, ...]


def cosine_with_warmup(
    epoch: float | Float[Array, ""], *, lr: float, min_lr: float, warmup_epochs: float, epochs: float
) -> Float[Array, ""]:
    """Learning rate at a fractional epoch: linear from 0 over the warm-up, then half a cosine down to `min_lr`."""
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    decayed = min_lr + (lr - min_lr) * 0.5 * (1 + jnp.cos(math.pi * progress))
    warm = lr * epoch / warmup_epochs if warmup_epochs > 0 else lr
    return jnp.where(epoch < warmup_epochs, warm, decayed)


def decays(path: Path) -> bool:
    """Whether weight decay acts on a parameter: not on biases, nor on the scales of norms.

    The published names end in `.bias` or `norm.weight` there. The scales of the two projections' norms
    are published as `visual_proj.1.weight` and `qformer_proj.1.weight`, so they do decay.
    """
    module, leaf = str(path[-2]), str(path[-1])
    if leaf == "bias":
        return False
    return not (leaf == "scale" and module not in ("visual_norm", "qformer_norm"))


def map_with_path(function: Callable[[Path, Array], object], tree: object) -> object:
    """`function(path, leaf)` over nested dicts, the path as a tuple of keys."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(tuple(key.key for key in path), leaf), tree)


def adamw(
    schedule: Callable[[Array], Array],
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (https://arxiv.org/abs/1711.05101) with decay on `decays` only."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            schedule,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=lambda params: map_with_path(lambda path, _: decays(path), params),
        ),
    )
