"""DINOv2's vision transformer (https://arxiv.org/abs/2304.07193), ViT-g/14 without registers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sharding import constrain
from sphinx_jax.config import DinoConfig
from sphinx_jax.layers import LayerNorm, Linear, fan_in_normal, make_layers, param
from sphinx_jax.vision.crops import resize
from sphinx_jax.vision.transformer import Block, Tokens, run_blocks

NORM_EPS = 1e-6


class SwiGLU(nnx.Module):
    """silu(x A) * (x B), then Linear (https://arxiv.org/abs/2002.05202); A and B are one array, `gate_up`."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        names = ("vision_embed", None, "vision_mlp")
        self.gate_up = param(rngs, (width, 2, hidden), names, fan_in_normal(width))
        self.gate_up_bias = param(rngs, (2, hidden), names[1:], nnx.initializers.zeros)
        self.down = Linear(hidden, width, ("vision_mlp", "vision_embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        gate_up = jnp.einsum("btd,dch->btch", x, self.gate_up[...].astype(x.dtype))
        gate_up = constrain(gate_up + self.gate_up_bias[...].astype(x.dtype), "batch", None, None, "vision_mlp")
        return constrain(self.down(jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]), "batch", "residual", None)


class DinoV2(nnx.Module):
    """All tokens, class token first, after the last norm."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        width = config.width

        def block(r: nnx.Rngs) -> Block:
            mlp = SwiGLU(width, config.hidden_dim, rngs=r)
            return Block(width, config.num_heads, mlp, NORM_EPS, layer_scale=True, rngs=r)

        self.grid = config.image_size // config.patch
        self.position_grid = config.position_grid
        self.tokens = Tokens(width, config.patch, config.position_grid, rngs=rngs)
        self.blocks = make_layers(block, config.num_layers, rngs)
        self.norm = LayerNorm(width, NORM_EPS, rngs=rngs)

    @jax.named_scope("dinov2")
    def __call__(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch length width"]:
        """Tokens of images normalised with ImageNet's statistics; length is 1 + (size / patch) squared."""
        return self.norm(run_blocks(self.blocks, self.tokens(images, self.positions()), remat))

    def positions(self) -> Float[Array, "length width"]:
        """The position embeddings, interpolated from the trained grid to that of this input size."""
        trained = self.tokens.positions[...].astype(jnp.float32)
        grid = trained[1:].reshape(1, self.position_grid, self.position_grid, -1)
        # The published code adds 0.1 to guard PyTorch's output size against rounding, which shifts every sample a
        # little: the published weights were trained with positions shifted like that.
        grid = resize(grid, self.grid, scale=(self.grid + 0.1) / self.position_grid)
        return jnp.concatenate([trained[:1], grid.reshape(self.grid**2, -1)])
