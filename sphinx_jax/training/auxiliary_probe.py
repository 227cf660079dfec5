"""An auxiliary loss for tiny models trained from scratch: what the picture shows, read off its words directly.

The gradient of the answers reaches untrained encoders slowly, through an untrained decoder. A linear probe
on the mean image word, asked for the attributes that the training questions name, reaches them at once.
The probe exists in training only; the published models never need it.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

ATTRIBUTES = {"shape": 3, "colour": 8}
"""Attribute of an easy-vqa picture -> number of values."""

Probe = dict[str, Float[Array, "dim values"]]


def abstract_probe(dim: int, mesh: Mesh) -> Probe:
    """Shapes, whole on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = lambda values: jax.ShapeDtypeStruct((dim, values), jnp.float32, sharding=everywhere)
    return {name: shape(values) for name, values in ATTRIBUTES.items()}


def init_probe(shapes: Probe) -> Probe:
    """Zeros: the first gradient makes the classes differ."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding), shapes)


def probe_losses(
    probe: Probe, words: Float[Array, "batch crops tokens dim"], batch: dict[str, Int[Array, "batch"]]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of the attributes' cross-entropies, -1 meaning unknown; and the share of each that is right."""
    pooled = words.mean(axis=(1, 2)).astype(jnp.float32)
    total, metrics = jnp.zeros(()), {}
    for name in ATTRIBUTES:
        truth, scores = batch[name], pooled @ probe[name]
        known = truth >= 0
        count = jnp.maximum(known.sum(), 1)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(truth, 0))
        total += losses.sum(where=known) / count
        metrics[f"{name}_accuracy"] = (scores.argmax(axis=-1) == truth).sum(where=known) / count
    return total, metrics
