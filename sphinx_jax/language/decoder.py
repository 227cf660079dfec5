"""The Mixtral decoder: token embedding, layers, final norm, output head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sharding import constrain
from sphinx_jax.config import DecoderConfig, LoraConfig
from sphinx_jax.errors import UserError
from sphinx_jax.kernels.attention_mask import Mask
from sphinx_jax.language.attention import Attention, LayerCache
from sphinx_jax.language.kv_cache import Cache
from sphinx_jax.language.moe import MoE
from sphinx_jax.layers import Embedding, Linear, RMSNorm, make_layers, run_layers


class DecoderLayer(nnx.Module):
    """h = x + attention(norm(x)), then h + moe(norm(h))."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.attention = Attention(config, lora, rngs=rngs)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.ffn = MoE(config, lora if lora and lora.target_modules == "all" else None, rngs=rngs)

    @jax.named_scope("decoder_layer")
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        positions: Int[Array, "batch length"],
        mask: Mask,
        cache: LayerCache | None = None,
        rank_mask: Float[Array, "batch rank"] | None = None,
    ) -> tuple[Float[Array, "batch length dim"], LayerCache | None, dict[str, Any]]:
        """The layer's output, the updated cache, and the intermediates: outputs of attention and FFN, routing."""
        h, normed, attention_out, cache = self.attend(x, positions, mask, cache, rank_mask)
        ffn_out, routing = self.ffn(normed, rank_mask)
        out = constrain(h + ffn_out, "batch", "residual", None)
        return out, cache, {"attention": attention_out, "ffn": ffn_out, "out": out, "routing": routing}

    def attend(
        self,
        x: Float[Array, "batch length dim"],
        positions: Int[Array, "batch length"],
        mask: Mask,
        cache: LayerCache | None,
        rank_mask: Float[Array, "batch rank"] | None = None,
    ) -> tuple[
        Float[Array, "batch length dim"],
        Float[Array, "batch length dim"],
        Float[Array, "batch length dim"],
        LayerCache | None,
    ]:
        """The layer without its experts: h, norm(h) for router and experts, attention's output, the updated cache."""
        normed = constrain(self.attention_norm(x), "batch", "residual", None)
        attention_out, cache = self.attention(normed, positions, mask, cache, rank_mask)
        h = x + attention_out
        return h, constrain(self.ffn_norm(h), "batch", "residual", None), attention_out, cache


class Decoder(nnx.Module):
    """The language model. `unstacked` makes the layers a list, for decoding, instead of stacked arrays."""

    def __init__(
        self, config: DecoderConfig, *, unstacked: bool = False, lora: LoraConfig | None = None, rngs: nnx.Rngs
    ):
        self.vocab_size, self.sliding_window = config.vocab_size, config.sliding_window
        self.embedding = Embedding(config.padded_vocab_size, config.dim, rngs=rngs)
        self.layers = make_layers(lambda r: DecoderLayer(config, lora, rngs=r), config.num_layers, rngs, unstacked)
        self.norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.head = Linear(config.dim, config.padded_vocab_size, ("embed", "vocab"), bias=False, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        positions: Int[Array, "batch length"],
        mask: Mask,
        cache: Cache | None = None,
        *,
        rank_mask: Float[Array, "batch rank"] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "batch length dim"], Cache | None, Any]:
        """Hidden states after the final norm, the updated cache, and the layers' intermediates.

        The intermediates are a list of dicts if the layers are unstacked, else one dict of stacked arrays: `attention`,
        `ffn` and `out` [batch, length, dim], and `routing` (`moe.Routing`). XLA removes those that the caller does not
        use. A cache needs unstacked layers. `rank_mask` says which ranks of the adapters, if there are any, apply to
        each sequence; None: all.
        """

        def body(layer, carry, layer_cache):
            out, layer_cache, intermediates = layer(carry, positions, mask, layer_cache, rank_mask)
            return out, (layer_cache, intermediates)

        length = x.shape[1]
        if cache is None and self.sliding_window is not None and length > self.sliding_window:
            raise UserError(
                f"sequences of {length} tokens exceed this model's sliding window of {self.sliding_window} tokens, "
                "beyond which attention is not supported: use shorter ones"
            )
        x = constrain(x, "batch", "residual", None)
        x, outputs = run_layers(self.layers, body, x, cache, remat=remat)
        if isinstance(self.layers, nnx.List):
            cache = None if cache is None else [layer_cache for layer_cache, _ in outputs]
            intermediates = [layer_intermediates for _, layer_intermediates in outputs]
        else:
            cache, intermediates = outputs
        hidden = constrain(self.norm(x), "batch", "residual", None)
        # All-gather the sequence: callers slice it.
        return constrain(hidden, "batch", "sequence", None), cache, intermediates

    @jax.named_scope("lm_head")
    def logits(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length vocab"]:
        """Next-token logits, float32, `padded_vocab_size` wide: padding has the lowest finite number."""
        logits = constrain(self.head(hidden), "batch", "sequence", "vocab").astype(jnp.float32)
        padded = logits.shape[-1]
        if padded == self.vocab_size:
            return logits
        # Finite, so that 0 x logit stays 0; after the softmax it is 0 exactly.
        return jnp.where(jnp.arange(padded) < self.vocab_size, logits, jnp.finfo(jnp.float32).min)
