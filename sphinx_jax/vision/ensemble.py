"""The ensemble of vision encoders, and the projections to the language model's dimension."""

import jax
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
CONCATENATED = ("clip", "convnext", "dino")
"""Encoders that give one token per position of a common grid; their channels are concatenated in this order."""


class Ensemble(nnx.Module):
    """Images in, image embeddings for the language model out. Only the encoders in the config exist."""

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
    ) -> dict[str, Float[Array, "crops _ _"]]:
        """The output tokens of each encoder, by its name; the first dimension is batch x crops, image by image."""
        dtype = self.start[...].dtype
        inputs = encoder_inputs(images, self.config)
        outputs = {name: getattr(self, name)(crops.astype(dtype), remat=remat) for name, crops in inputs.items()}
        return {name: constrain(tokens, "batch", "residual", None) for name, tokens in outputs.items()}

    def __call__(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch crops tokens dim"]:
        """Image embeddings of images normalised with CLIP's mean and standard deviation.

        The tokens of a crop are the Q-Former's queries, then one per position of the other encoders' common grid, the
        class token first. `remat` is the rematerialisation policy of the encoders' blocks (`layers.run_layers`).
        Raises ValueError if the images do not have the config's size.
        """
        size = self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"images must be [batch, {size}, {size}, 3], got {list(images.shape)}")
        features = self.features(images, remat=remat)
        with jax.named_scope("vision_projection"):
            projected = []
            if self.qformer_proj is not None and self.qformer_norm is not None:
                projected.append(self.qformer_norm(self.qformer_proj(features["qformer"])))
            if self.visual_proj is not None and self.visual_norm is not None:
                grid = jnp.concatenate([features[name] for name in CONCATENATED if name in features], axis=-1)
                projected.append(self.visual_norm(self.visual_proj(grid)))
            tokens = jnp.concatenate(projected, axis=1)
            # [batch x crops, tokens, dim] -> [batch, crops, tokens, dim]
            return constrain(tokens.reshape(-1, self.config.num_crops, *tokens.shape[1:]), "batch", None, None, None)

    def add_markers(
        self, image_embeds: Float[Array, "batch crops tokens dim"]
    ) -> Float[Array, "batch image_tokens dim"]:
        """Each crop between the learned start and end vectors; image_tokens = crops x (tokens + 2)."""
        batch, num_crops, _, dim = image_embeds.shape
        start, end = (
            jnp.broadcast_to(vector[...].astype(image_embeds.dtype), (batch, num_crops, 1, dim))
            for vector in (self.start, self.end)
        )
        return jnp.concatenate([start, image_embeds, end], axis=2).reshape(batch, -1, dim)
