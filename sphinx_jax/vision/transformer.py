"""Modules of all vision transformers: patch embedding, tokens, attention, MLP, and the pre-norm block."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sharding import constrain
from sphinx_jax.kernels.attention import attention
from sphinx_jax.layers import LayerNorm, Linear, fan_in_normal, param, run_layers


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x), with the exact normal distribution function (https://arxiv.org/abs/1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


class Patchify(nnx.Module):
    """A convolution whose stride is its kernel size: every patch times one matrix."""

    def __init__(self, in_dim: int, out_dim: int, patch: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = param(
            rngs,
            (patch, patch, in_dim, out_dim),
            (None, None, "vision_embed", "vision_channels"),
            fan_in_normal(patch * patch * in_dim),
        )
        self.bias = param(rngs, (out_dim,), ("norm",), nnx.initializers.zeros) if bias else None

    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch rows columns out"]:
        """rows = height / patch, columns = width / patch, which must divide."""
        kernel = self.kernel[...].astype(x.dtype)
        patch, _, in_dim, out_dim = kernel.shape
        batch, height, width, _ = x.shape
        rows, columns = height // patch, width // patch
        patches = x.reshape(batch, rows, patch, columns, patch, in_dim).transpose(0, 1, 3, 2, 4, 5)
        y = patches.reshape(batch, rows, columns, -1) @ kernel.reshape(-1, out_dim)
        # Each device computes its own output channels, which are then all-gathered.
        y = constrain(constrain(y, "batch", None, None, "vision_channels"), "batch", None, None, None)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Tokens(nnx.Module):
    """An image as tokens: a learned class token, then the patches row by row, plus position embeddings.

    `position_grid` is the side of the grid of the learned position embeddings.
    """

    def __init__(self, width: int, patch: int, position_grid: int, *, bias: bool = True, rngs: nnx.Rngs):
        init = nnx.initializers.normal(1 / math.sqrt(width))
        self.patches = Patchify(3, width, patch, bias=bias, rngs=rngs)
        self.class_token = param(rngs, (width,), ("norm",), init)
        self.positions = param(rngs, (position_grid**2 + 1, width), (None, "vision_channels"), init)

    def __call__(
        self, images: Float[Array, "batch size size 3"], positions: Float[Array, "length width"] | None = None
    ) -> Float[Array, "batch length width"]:
        """length is 1 + the number of patches; `positions` replaces the learned position embeddings."""
        patches = self.patches(images)
        batch, rows, columns, width = patches.shape
        class_token = jnp.broadcast_to(self.class_token[...].astype(images.dtype), (batch, 1, width))
        tokens = jnp.concatenate([class_token, patches.reshape(batch, rows * columns, width)], axis=1)
        positions = self.positions[...] if positions is None else positions
        return constrain(tokens + positions.astype(images.dtype), "batch", "residual", None)


class SelfAttention(nnx.Module):
    """Multi-head attention of all tokens to all tokens; queries, keys and values are one array."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        head_dim, zeros = width // num_heads, nnx.initializers.zeros
        in_names, out_names = ("vision_embed", None, "vision_heads", None), ("vision_heads", None, "vision_embed")
        self.qkv = param(rngs, (width, 3, num_heads, head_dim), in_names, fan_in_normal(width))
        self.qkv_bias = param(rngs, (3, num_heads, head_dim), in_names[1:], zeros)
        self.out = param(rngs, (num_heads, head_dim, width), out_names, fan_in_normal(width))
        self.out_bias = param(rngs, (width,), ("norm",), zeros)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        qkv = jnp.einsum("btd,dchk->btchk", x, self.qkv[...].astype(x.dtype)) + self.qkv_bias[...].astype(x.dtype)
        qkv = constrain(qkv, "batch", None, None, "vision_heads", None)
        # Multi-head attention: one query head per key/value head.
        q, k, v = qkv[:, :, 0, :, None], qkv[:, :, 1], qkv[:, :, 2]
        heads = attention(q, k, v)[:, :, :, 0]
        out = jnp.einsum("bthk,hkd->btd", heads, self.out[...].astype(x.dtype))
        return constrain(out, "batch", "residual", None) + self.out_bias[...].astype(x.dtype)


class MLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, hidden, ("vision_embed", "vision_mlp"), rngs=rngs)
        self.fc2 = Linear(hidden, width, ("vision_mlp", "vision_embed"), rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        # XLA:CPU's matrix product is faster on two dimensions than on four.
        flat = x.reshape(-1, x.shape[-1])
        hidden = constrain(self.activation(self.fc1(flat)), "batch", "vision_mlp")
        return constrain(self.fc2(hidden), "batch", None).reshape(x.shape)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `layer_scale` each branch is scaled by a learned vector."""

    def __init__(
        self, width: int, num_heads: int, mlp: nnx.Module, eps: float, *, layer_scale: bool = False, rngs: nnx.Rngs
    ):
        self.norm1 = LayerNorm(width, eps, rngs=rngs)
        self.attention = SelfAttention(width, num_heads, rngs=rngs)
        self.scale1 = param(rngs, (width,), ("norm",), nnx.initializers.ones) if layer_scale else None
        self.norm2 = LayerNorm(width, eps, rngs=rngs)
        self.mlp = mlp
        self.scale2 = param(rngs, (width,), ("norm",), nnx.initializers.ones) if layer_scale else None

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        x = x + scaled(self.attention(self.norm1(x)), self.scale1)
        return constrain(x + scaled(self.mlp(self.norm2(x)), self.scale2), "batch", "residual", None)


def scaled(x: Float[Array, "*batch width"], scale: nnx.Param | None) -> Float[Array, "*batch width"]:
    """x times a learned vector, or x (layer scale, https://arxiv.org/abs/2103.17239)."""
    return x if scale is None else x * scale[...].astype(x.dtype)


def run_blocks(blocks: nnx.Module, x: Float[Array, "batch *dims"], remat: str = "none") -> Float[Array, "batch *dims"]:
    """The output of stacked blocks that map one array to one. `remat` as in `layers.run_layers`."""
    return run_layers(blocks, lambda block, carry, _: (block(carry), None), x, remat=remat)[0]
