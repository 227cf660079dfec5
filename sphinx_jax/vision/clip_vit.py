"""CLIP's vision transformer (https://arxiv.org/abs/2103.00020), as OpenCLIP builds ViT-L/14."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from sphinx_jax.config import ClipConfig
from sphinx_jax.layers import LayerNorm, make_layers
from sphinx_jax.vision.transformer import MLP, Block, Tokens, gelu, quick_gelu, run_blocks

NORM_EPS = 1e-5
ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class ClipViT(nnx.Module):
    """All tokens, class token first, after the last norm; no projection into CLIP's joint space."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        width, activation = config.width, ACTIVATIONS[config.activation]

        def block(r: nnx.Rngs) -> Block:
            return Block(width, config.num_heads, MLP(width, 4 * width, activation, rngs=r), NORM_EPS, rngs=r)

        self.tokens = Tokens(width, config.patch, config.image_size // config.patch, bias=False, rngs=rngs)
        self.norm_pre = LayerNorm(width, NORM_EPS, rngs=rngs)
        self.blocks = make_layers(block, config.num_layers, rngs)
        self.norm_post = LayerNorm(width, NORM_EPS, rngs=rngs)

    @jax.named_scope("clip")
    def __call__(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch length width"]:
        """Tokens of images normalised with CLIP's statistics; length is 1 + (size / patch) squared."""
        return self.norm_post(run_blocks(self.blocks, self.norm_pre(self.tokens(images)), remat))
