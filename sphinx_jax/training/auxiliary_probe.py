"""The auxiliary loss of easy-vqa, for tiny models trained from scratch: classify each image's shape and colour.

The gradient of the answer tokens reaches untrained encoders slowly, through an untrained decoder. A linear probe on
the mean image embedding, supervised with the attributes that the training questions name, reaches them directly.
The probe exists in training only; the published models never need it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sphinx_jax.training.step import AuxiliaryLoss, Batch, Metrics, Params

PROBE_CLASSES = {"shape": 3, "colour": 8}
"""Attribute of an easy-vqa image -> number of classes."""


def auxiliary_probe(dim: int, weight: float) -> AuxiliaryLoss:
    """The probe on image embeddings of `dim` channels, its loss multiplied by `weight`."""

    def loss(params: Params, intermediates: dict[str, Any], batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        value, metrics = aux_probe_loss(params, intermediates["image_embeds"], batch)
        return weight * value, metrics

    shapes = {name: jax.ShapeDtypeStruct((dim, classes), jnp.float32) for name, classes in PROBE_CLASSES.items()}
    return AuxiliaryLoss(shapes, loss)


def aux_probe_loss(
    probe: dict[str, Float[Array, "dim _classes"]],
    image_embeds: Float[Array, "batch crops tokens dim"],
    batch: dict[str, Int[Array, "batch ..."] | Array],
) -> tuple[Float[Array, ""], Metrics]:
    """Sum of the attributes' cross-entropies, label -1 meaning unknown; and the accuracy on each attribute."""
    pooled = image_embeds.mean(axis=(1, 2)).astype(jnp.float32)
    total, metrics = jnp.zeros(()), {}
    for name in PROBE_CLASSES:
        labels, logits = batch[name], pooled @ probe[name]
        known = labels >= 0
        count = jnp.maximum(known.sum(), 1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        total += losses.sum(where=known) / count
        metrics[f"{name}_accuracy"] = (logits.argmax(axis=-1) == labels).sum(where=known) / count
    return total, metrics
