"""AdamW as in the original training: clipping, decayed parameters and trainable parameters."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from sphinx_jax.training.moments import Moments, scale_by_moments

Path = tuple[str | int, ...]


def decays(path: Path) -> bool:
    """Whether weight decay applies to a parameter: not to biases, nor to the scales of norms.

    The published names end in `.bias` or `norm.weight` there. The scales of the two projections' norms
    are published as `visual_proj.1.weight` and `qformer_proj.1.weight`, so they do decay.
    """
    module, leaf = str(path[-2]), str(path[-1])
    if leaf == "bias":
        return False
    return not (leaf == "scale" and module not in ("visual_norm", "qformer_norm"))


Stage = Literal["all", "mm_stage2", "mm_stage1", "language", "lora"]
"""Trainable parameters: all; all but the encoders; the projection of the image embeddings and the image start and end
vectors; the decoder; LoRA adapters only."""

ENCODERS = ("clip", "convnext", "dino", "qformer")


def is_trainable(path: Path, stage: Stage) -> bool:
    """Whether a parameter of the model is trainable in a stage of the original training.

    In `mm_stage1` the Q-Former's projection is frozen, as in the original.
    """
    part, member = path[0], path[1]
    if stage == "lora":
        return False
    if stage == "language":
        return part == "language"
    if stage == "mm_stage1":
        return part == "vision" and member in ("visual_proj", "visual_norm", "start", "end")
    return stage == "all" or part == "language" or member not in ENCODERS


def map_with_path(function: Callable[[Path, Any], Any], tree: Any) -> Any:
    """`function(path, leaf)` over nested dicts, the path as a tuple of keys."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(tuple(key.key for key in path), leaf), tree)


def trainable_only(optimizer: optax.GradientTransformation, trainable: Any) -> optax.GradientTransformation:
    """`optimizer` on the parameters where the mask `trainable` is True; the others are frozen and have no state."""
    labels = jax.tree.map(lambda is_trainable: "trainable" if is_trainable else "frozen", trainable)
    return optax.partition({"trainable": optimizer, "frozen": optax.set_to_zero()}, labels)


def adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (https://arxiv.org/abs/1711.05101) with decay on `decays` only."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        scale_by_moments(moments, b1, b2),
        optax.add_decayed_weights(
            weight_decay, mask=lambda params: map_with_path(lambda path, _: decays(path), params)
        ),
        optax.scale_by_learning_rate(schedule),
    )
