"""The Mixtral decoder: embedding, layers, final norm, output head."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sharding import constrain
from sphinx_jax.config import DecoderConfig, LoraConfig
from sphinx_jax.kernels.attention_mask import Mask
from sphinx_jax.language.attention import Attention, LayerCache
from sphinx_jax.language.kv_cache import Cache
from sphinx_jax.language.moe import MoE
from sphinx_jax.layers import Embedding, Linear, RMSNorm, make_layers, run_layers


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then h + moe_ffn(norm(h))."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.attention = Attention(config, lora, rngs=rngs)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.ffn = MoE(config, lora if lora and lora.target_modules == "all" else None, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        positions: Int[Array, "batch length"],
        mask: Mask,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "batch length dim"], LayerCache | None, dict[str, Any]]:
        normed = constrain(self.attention_norm(x), "batch", "residual", None)
        attended, cache = self.attention(normed, positions, mask, cache)
        h = x + attended
        fed, routing = self.ffn(constrain(self.ffn_norm(h), "batch", "residual", None))
        out = constrain(h + fed, "batch", "residual", None)
        return out, cache, {"attention": attended, "ffn": fed, "out": out, "routing": routing}


class Decoder(nnx.Module):
    """The language half. `unstacked` holds the layers as a list, for decoding, instead of stacked."""

    def __init__(
        self, config: DecoderConfig, *, unstacked: bool = False, lora: LoraConfig | None = None, rngs: nnx.Rngs
    ):
        self.embedding = Embedding(config.vocab_size, config.dim, rngs=rngs)
        self.layers = make_layers(lambda r: DecoderLayer(config, lora, rngs=r), config.num_layers, rngs, unstacked)
        self.norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.head = Linear(config.dim, config.vocab_size, ("embed", "vocab"), bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        positions: Int[Array, "batch length"],
        mask: Mask,
        cache: Cache | None = None,
        *,
        remat: str = "none",
    ) -> tuple[Float[Array, "batch length dim"], Cache | None, Any]:
        """Normed hidden states of embedded words, the cache with their keys and values, and what each layer did.

        The record of the layers is a list of dicts, or one dict of stacked arrays: `attention`, `ffn` and
        `out` [batch, length, dim], and `routing`. What the caller does not use is never computed or kept.
        """

        def body(layer, carry, layer_cache):
            out, layer_cache, record = layer(carry, positions, mask, layer_cache)
            return out, (layer_cache, record)

        x = constrain(x, "batch", "residual", None)
        x, outputs = run_layers(self.layers, body, x, cache, remat=remat)
        if isinstance(self.layers, nnx.List):
            cache, records = (list(part) for part in zip(*outputs, strict=True))
            cache = None if cache[0] is None else cache
        else:
            cache, records = outputs
        hidden = constrain(self.norm(x), "batch", "residual", None)
        # Whole again: what is made of it is cut along the sequence.
        return constrain(hidden, "batch", "sequence", None), cache, records

    def logits(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length vocab"]:
        """Next-word scores, float32."""
        return constrain(self.head(hidden), "batch", "sequence", "vocab").astype(jnp.float32)
