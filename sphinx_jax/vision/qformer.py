"""BLIP-2's Q-Former and its vision encoder, EVA ViT-g (https://arxiv.org/abs/2301.12597)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sharding import constrain
from sphinx_jax.config import QFormerConfig
from sphinx_jax.kernels.attention import attention
from sphinx_jax.layers import LayerNorm, fan_in_normal, make_layers, param, run_layers
from sphinx_jax.vision.transformer import MLP, Block, SelfAttention, Tokens, gelu, run_blocks

VIT_NORM_EPS = 1e-6
NORM_EPS = 1e-12


class EvaViT(nnx.Module):
    """All tokens, class token first, after the last norm."""

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        width = config.vision_width

        def block(r: nnx.Rngs) -> Block:
            mlp = MLP(width, config.vision_mlp, gelu, rngs=r)
            return Block(width, config.vision_heads, mlp, VIT_NORM_EPS, rngs=r)

        self.tokens = Tokens(width, config.patch, config.image_size // config.patch, rngs=rngs)
        self.blocks = make_layers(block, config.vision_layers, rngs)
        self.norm = LayerNorm(width, VIT_NORM_EPS, rngs=rngs)

    @jax.named_scope("eva_vit")
    def __call__(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch length vision_width"]:
        """Tokens of images normalised with CLIP's statistics; length is 1 + (size / patch) squared."""
        x = run_blocks(self.blocks, self.tokens(images), remat)
        return constrain(self.norm(x), "batch", "residual", None)


class CrossAttention(nnx.Module):
    """Multi-head attention from the queries to an image's tokens; keys and values are one array."""

    def __init__(self, width: int, num_heads: int, vision_width: int, *, rngs: nnx.Rngs):
        head_dim, zeros = width // num_heads, nnx.initializers.zeros
        q_names, kv_names = ("vision_embed", "vision_heads", None), ("vision_embed", None, "vision_heads", None)
        self.q = param(rngs, (width, num_heads, head_dim), q_names, fan_in_normal(width))
        self.q_bias = param(rngs, (num_heads, head_dim), q_names[1:], zeros)
        self.kv = param(rngs, (vision_width, 2, num_heads, head_dim), kv_names, fan_in_normal(vision_width))
        self.kv_bias = param(rngs, (2, num_heads, head_dim), kv_names[1:], zeros)
        out_names = ("vision_heads", None, "vision_embed")
        self.out = param(rngs, (num_heads, head_dim, width), out_names, fan_in_normal(width))
        self.out_bias = param(rngs, (width,), ("norm",), zeros)

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "batch queries width"], image_tokens: Float[Array, "batch length vision_width"]
    ) -> Float[Array, "batch queries width"]:
        q = jnp.einsum("btd,dhk->bthk", x, self.q[...].astype(x.dtype)) + self.q_bias[...].astype(x.dtype)
        q = constrain(q, "batch", None, "vision_heads", None)
        kv = jnp.einsum("btd,dchk->btchk", image_tokens, self.kv[...].astype(x.dtype))
        kv = constrain(kv + self.kv_bias[...].astype(x.dtype), "batch", None, None, "vision_heads", None)
        heads = attention(q[:, :, :, None], kv[:, :, 0], kv[:, :, 1])[:, :, :, 0]
        out = jnp.einsum("bthk,hkd->btd", heads, self.out[...].astype(x.dtype))
        return constrain(out, "batch", "residual", None) + self.out_bias[...].astype(x.dtype)


class QFormerLayer(nnx.Module):
    """Post-norm layer: self-attention, cross-attention if `cross`, MLP, each as norm(x + f(x))."""

    def __init__(self, config: QFormerConfig, *, cross: bool, rngs: nnx.Rngs):
        width, heads = config.width, config.num_heads
        self.attention = SelfAttention(width, heads, rngs=rngs)
        self.attention_norm = LayerNorm(width, NORM_EPS, rngs=rngs)
        self.cross = CrossAttention(width, heads, config.vision_width, rngs=rngs) if cross else None
        self.cross_norm = LayerNorm(width, NORM_EPS, rngs=rngs) if cross else None
        self.mlp = MLP(width, config.mlp, gelu, rngs=rngs)
        self.mlp_norm = LayerNorm(width, NORM_EPS, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch queries width"], image_tokens: Float[Array, "batch length vision_width"]
    ) -> Float[Array, "batch queries width"]:
        x = self.attention_norm(x + self.attention(x))
        if self.cross is not None and self.cross_norm is not None:
            x = self.cross_norm(x + self.cross(x, image_tokens))
        return constrain(self.mlp_norm(x + self.mlp(x)), "batch", "residual", None)


class QFormerGroup(nnx.Module):
    """One layer with cross-attention to the image, and the layers without it that follow."""

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [QFormerLayer(config, cross=i == 0, rngs=rngs) for i in range(config.cross_attention_every)]
        )

    def __call__(
        self, x: Float[Array, "batch queries width"], image_tokens: Float[Array, "batch length vision_width"]
    ) -> Float[Array, "batch queries width"]:
        for layer in self.layers:
            x = layer(x, image_tokens)
        return x


class QFormer(nnx.Module):
    """Learned queries with cross-attention to the image's tokens: `num_queries` output tokens for any image size."""

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        num_groups, remainder = divmod(config.num_layers, config.cross_attention_every)
        if remainder:
            raise ValueError(
                f"the Q-Former's {config.num_layers} layers must be a multiple of {config.cross_attention_every}"
            )
        self.vit = EvaViT(config, rngs=rngs)
        self.queries = param(rngs, (config.num_queries, config.width), (None, "norm"), nnx.initializers.normal(0.02))
        self.norm = LayerNorm(config.width, NORM_EPS, rngs=rngs)
        self.groups = make_layers(lambda r: QFormerGroup(config, rngs=r), num_groups, rngs)

    @jax.named_scope("qformer")
    def __call__(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch queries width"]:
        """Tokens of images normalised with CLIP's statistics."""
        image_tokens = self.vit(images, remat=remat)
        queries = self.norm(self.queries[...].astype(images.dtype))
        x = constrain(jnp.broadcast_to(queries, (images.shape[0], *queries.shape)), "batch", "residual", None)
        return run_layers(self.groups, lambda group, carry, _: (group(carry, image_tokens), None), x, remat=remat)[0]
