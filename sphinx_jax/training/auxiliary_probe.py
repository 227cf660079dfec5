"""An auxiliary probe loss for tiny models trained from scratch: classify an image's attributes from its embeddings.

The gradient of the answer tokens reaches untrained encoders slowly, through an untrained decoder. A linear probe on
the mean image embedding, supervised with the attributes that the training questions name, reaches them directly.
The probe exists in training only; the published models never need it.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

PROBE_CLASSES = {"shape": 3, "colour": 8}
"""Attribute of an easy-vqa image -> number of classes."""

Probe = dict[str, Float[Array, "dim classes"]]


def abstract_probe(dim: int, mesh: Mesh) -> Probe:
    """The probe's abstract parameters, replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    shape = lambda classes: jax.ShapeDtypeStruct((dim, classes), jnp.float32, sharding=replicated)
    return {name: shape(classes) for name, classes in PROBE_CLASSES.items()}


def init_probe(shapes: Probe) -> Probe:
    """Zeros: the first gradient already distinguishes the classes."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding), shapes)


def aux_probe_loss(
    probe: Probe, image_embeds: Float[Array, "batch crops tokens dim"], batch: dict[str, Int[Array, "batch"]]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
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
