"""ConvNeXt (https://arxiv.org/abs/2201.03545), the trunk of OpenCLIP's ConvNeXt-XXL."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sharding import constrain
from sphinx_jax.config import ConvNextConfig
from sphinx_jax.kernels.depthwise import depthwise_conv
from sphinx_jax.layers import LayerNorm, fan_in_normal, make_layers, param
from sphinx_jax.vision.transformer import MLP, Patchify, gelu, run_blocks, scaled

NORM_EPS = 1e-5


class ConvNextBlock(nnx.Module):
    """x + gamma x mlp(norm(depthwise convolution of x))."""

    def __init__(self, dim: int, kernel: int, *, rngs: nnx.Rngs):
        self.depthwise = param(
            rngs, (kernel, kernel, dim), (None, None, "vision_channels"), fan_in_normal(kernel * kernel)
        )
        self.depthwise_bias = param(rngs, (dim,), ("norm",), nnx.initializers.zeros)
        self.norm = LayerNorm(dim, NORM_EPS, rngs=rngs)
        self.mlp = MLP(dim, 4 * dim, gelu, rngs=rngs)
        # The paper initialises gamma to 1e-6, for trunks of tens of blocks. Such trunks are always loaded here; the
        # small ones that are trained from scratch converge faster with gamma 1.
        self.gamma = param(rngs, (dim,), ("norm",), nnx.initializers.ones)

    def __call__(self, x: Float[Array, "batch height width dim"]) -> Float[Array, "batch height width dim"]:
        mixed = depthwise_conv(x, self.depthwise[...].astype(x.dtype))
        mixed = constrain(mixed, "batch", None, None, None) + self.depthwise_bias[...].astype(x.dtype)
        out = x + scaled(self.mlp(self.norm(mixed)), self.gamma)
        return constrain(out, "batch", None, None, None)


class Stage(nnx.Module):
    """A downsampling by 2 (not in the first stage, whose `in_dim` is None), then blocks of one resolution."""

    def __init__(self, in_dim: int | None, dim: int, depth: int, kernel: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(in_dim, NORM_EPS, rngs=rngs) if in_dim else None
        self.downsample = Patchify(in_dim, dim, 2, rngs=rngs) if in_dim else None
        self.blocks = make_layers(lambda r: ConvNextBlock(dim, kernel, rngs=r), depth, rngs)

    def __call__(
        self, x: Float[Array, "batch height width in"], remat: str = "none"
    ) -> Float[Array, "batch rows columns dim"]:
        if self.norm is not None and self.downsample is not None:
            x = self.downsample(self.norm(x))
        return run_blocks(self.blocks, x, remat)


class ConvNext(nnx.Module):
    """The feature map after the head's norm as one token per position, and in front of them their mean."""

    def __init__(self, config: ConvNextConfig, *, rngs: nnx.Rngs):
        dims, depths = config.dims, config.depths
        self.stem = Patchify(3, dims[0], 4, rngs=rngs)
        self.stem_norm = LayerNorm(dims[0], NORM_EPS, rngs=rngs)
        self.stages = nnx.List(
            [
                Stage(in_dim, dim, depth, config.kernel, rngs=rngs)
                for in_dim, dim, depth in zip((None, *dims[:-1]), dims, depths, strict=True)
            ]
        )
        self.norm = LayerNorm(dims[-1], NORM_EPS, rngs=rngs)

    @jax.named_scope("convnext")
    def __call__(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch length channels"]:
        """Tokens of images normalised with CLIP's statistics; length is 1 + the last stage's positions, row by row."""
        x = self.stem_norm(self.stem(images))
        for stage in self.stages:
            x = stage(x, remat)
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
