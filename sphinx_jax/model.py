"""SphinxMoE: joins the encoders' words and the text, and nothing else."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sphinx_jax.config import LoraConfig, SphinxConfig
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.language.decoder import Decoder
from sphinx_jax.language.kv_cache import segment_mask, segment_positions
from sphinx_jax.vision.ensemble import Ensemble


class SphinxMoE(nnx.Module):
    """Pictures and text in, next-word scores out.

    `unstacked` holds the decoder's layers as a list instead of stacked (see `layers.make_layers`); `lora` puts adapters
    beside the matrices of attention and experts (see `adapters`).
    """

    def __init__(
        self, config: SphinxConfig, *, unstacked: bool = False, lora: LoraConfig | None = None, rngs: nnx.Rngs
    ):
        self.language = Decoder(config.language, unstacked=unstacked, lora=lora, rngs=rngs)
        self.vision = Ensemble(config.vision, config.language.dim, rngs=rngs) if config.vision else None

    def encode_images(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch crops tokens dim"]:
        """Normalised pictures as words of the language model, before the start and end vectors."""
        return self.vision(images, remat=remat)

    def embed(
        self, tokens: Int[Array, "batch text"], words: Float[Array, "batch crops tokens dim"] | None = None
    ) -> Float[Array, "batch length dim"]:
        """The sequence that the decoder sees: first token, the picture's views each between a start and an
        end vector, then the rest of the text. length = text + views x (words + 2).
        """
        text = self.language.embedding(tokens)
        if words is None:
            return text
        picture = self.vision.between_markers(words).astype(text.dtype)
        return jnp.concatenate([text[:, :1], picture, text[:, 1:]], axis=1)

    def __call__(
        self,
        tokens: Int[Array, "batch text"],
        images: Float[Array, "batch size size 3"] | None = None,
        segment_ids: Int[Array, "batch text"] | None = None,
        *,
        remat: str = "none",
    ) -> tuple[Float[Array, "batch text vocab"], dict[str, Any]]:
        """Scores of the word after each text token, teacher-forced, float32; and a record of the way there.

        `segment_ids` numbers the turn of each token, 0 being the shared beginning: each turn then sees only itself
        and the beginning. `remat` names what the blocks of decoder and encoders keep for their gradients
        (`layers.run_layers`). The record holds `words`, `embedded`, `hidden` (after the final norm) and `layers`.
        """
        words = None if images is None else self.encode_images(images, remat=remat)
        x = self.embed(tokens, words)
        batch, length, _ = x.shape
        picture = length - tokens.shape[1]
        if segment_ids is None:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
            mask = Causal()
        else:
            # The picture stands after the first token, in the shared beginning.
            segment_ids = jnp.concatenate(
                [segment_ids[:, :1], jnp.zeros((batch, picture), segment_ids.dtype), segment_ids[:, 1:]], axis=1
            )
            positions, mask = segment_positions(segment_ids), segment_mask(segment_ids)
        hidden, _, layers = self.language(x, positions, mask, remat=remat)
        # What follows the first token is said by the word before it: by the picture's last, where there is one.
        record = {"words": words, "embedded": x, "hidden": hidden, "layers": layers}
        return self.language.logits(hidden[:, picture:]), record


def bind(graph: nnx.GraphDef, params: dict[str, Any]) -> SphinxMoE:
    """The module with `params` (nested dicts of arrays) as its parameters."""
    return nnx.merge(graph, nnx.State(params))
