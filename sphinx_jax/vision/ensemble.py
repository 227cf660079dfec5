"""The encoders of a picture, side by side, and their words in the language model's dimension."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sharding import constrain
from sphinx_jax.config import VisionConfig
from sphinx_jax.layers import LayerNorm, Linear, param
from sphinx_jax.vision.clip_vit import ClipViT
from sphinx_jax.vision.convnext import ConvNext
from sphinx_jax.vision.crops import encoder_inputs
from sphinx_jax.vision.dinov2 import DinoV2
from sphinx_jax.vision.qformer import QFormer

NORM_EPS = 1e-5
JOINED = ("clip", "convnext", "dino")
"""Encoders that give one word for each place of a common grid; their channels are joined in this order."""


class Ensemble(nnx.Module):
    """Pictures in; words of the language model out, view by view. Only the encoders that the config names exist."""

    def __init__(self, config: VisionConfig, dim: int, *, rngs: nnx.Rngs):
        self.config = config
        self.clip = ClipViT(config.clip, rngs=rngs) if config.clip else None
        self.convnext = ConvNext(config.convnext, rngs=rngs) if config.convnext else None
        self.dino = DinoV2(config.dino, rngs=rngs) if config.dino else None
        self.qformer = QFormer(config.qformer, rngs=rngs) if config.qformer else None
        channels, names = config.ensemble_channels, ("vision_embed", "vision_channels")
        self.visual_proj = Linear(channels, dim, names, rngs=rngs) if channels else None
        self.visual_norm = LayerNorm(dim, NORM_EPS, rngs=rngs) if channels else None
        self.qformer_proj = Linear(config.qformer.width, dim, names, rngs=rngs) if config.qformer else None
        self.qformer_norm = LayerNorm(dim, NORM_EPS, rngs=rngs) if config.qformer else None
        self.start = param(rngs, (dim,), ("norm",), nnx.initializers.normal(0.02))
        self.end = param(rngs, (dim,), ("norm",), nnx.initializers.normal(0.02))

    def features(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> dict[str, Float[Array, "crops length channels"]]:
        """What each encoder says of each view, by the encoder's name; crops are batch x views, picture by picture."""
        dtype = self.start[...].dtype
        inputs = encoder_inputs(images, self.config)
        seen = {name: getattr(self, name)(crops.astype(dtype), remat=remat) for name, crops in inputs.items()}
        return {name: constrain(features, "batch", "residual", None) for name, features in seen.items()}

    def __call__(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch crops tokens dim"]:
        """Words of pictures normalised with CLIP's mean and deviation.

        A view's words are the Q-Former's, then one for each place of the other encoders' common grid.
        `remat` names what each block keeps for its gradient (`layers.run_layers`).
        Raises ValueError if the pictures do not have the config's size.
        """
        size = self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"pictures must be [batch, {size}, {size}, 3], got {list(images.shape)}")
        features = self.features(images, remat=remat)
        words = []
        if self.qformer is not None:
            words.append(self.qformer_norm(self.qformer_proj(features["qformer"])))
        if self.visual_proj is not None:
            joined = jnp.concatenate([features[name] for name in JOINED if name in features], axis=-1)
            words.append(self.visual_norm(self.visual_proj(joined)))
        crops = jnp.concatenate(words, axis=1)
        return constrain(crops.reshape(-1, self.config.num_crops, *crops.shape[1:]), "batch", None, None, None)

    def between_markers(self, words: Float[Array, "batch crops tokens dim"]) -> Float[Array, "batch image_tokens dim"]:
        """Each view between the learned start and end vectors; image_words is views x (words + 2)."""
        batch, num_crops, _, dim = words.shape
        start, end = (
            jnp.broadcast_to(vector[...].astype(words.dtype), (batch, num_crops, 1, dim))
            for vector in (self.start, self.end)
        )
        return jnp.concatenate([start, words, end], axis=2).reshape(batch, -1, dim)
