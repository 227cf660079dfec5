"""SphinxMoE: the vision encoders and the decoder as one model."""

from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sphinx_jax.config import LoraConfig, SphinxConfig
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.language.decoder import Decoder
from sphinx_jax.language.kv_cache import segment_mask, segment_positions
from sphinx_jax.vision.ensemble import Ensemble

Module = TypeVar("Module")


class SphinxMoE(nnx.Module):
    """Images and text tokens in, next-token logits out.

    `unstacked` makes the decoder's layers a list instead of stacked arrays (`layers.make_layers`); `lora` adds adapters
    to the matrices of attention and experts (`layers.LowRank`).
    """

    def __init__(
        self, config: SphinxConfig, *, unstacked: bool = False, lora: LoraConfig | None = None, rngs: nnx.Rngs
    ):
        self.language = Decoder(config.language, unstacked=unstacked, lora=lora, rngs=rngs)
        self.vision = Ensemble(config.vision, config.language.dim, rngs=rngs) if config.vision else None

    def encode_images(
        self, images: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> Float[Array, "batch crops tokens dim"]:
        """Image embeddings of normalised images, without the start and end vectors. The model must have encoders."""
        assert self.vision is not None
        return self.vision(images, remat=remat)

    def embed(
        self, tokens: Int[Array, "batch text"], image_embeds: Float[Array, "batch crops tokens dim"] | None = None
    ) -> Float[Array, "batch length dim"]:
        """The decoder's input: BOS, the image embeddings with start and end vectors, then the rest of the text.

        length = text + crops x (tokens + 2) with an image, else text.
        """
        text = self.language.embedding(tokens)
        if image_embeds is None:
            return text
        assert self.vision is not None
        image = self.vision.add_markers(image_embeds).astype(text.dtype)
        return jnp.concatenate([text[:, :1], image, text[:, 1:]], axis=1)

    def __call__(
        self,
        tokens: Int[Array, "batch text"],
        images: Float[Array, "batch size size 3"] | None = None,
        segment_ids: Int[Array, "batch text"] | None = None,
        *,
        rank_mask: Float[Array, "batch rank"] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "batch text vocab"], dict[str, Any]]:
        """Logits of the token after each text token, teacher-forced, float32; and the intermediates.

        `segment_ids` is the segment of each token, 0 for the shared prefix: each segment attends to itself and the
        prefix only. `rank_mask` says which ranks of the adapters apply to each sequence (None: all). `remat` is the
        rematerialisation policy of decoder and encoders (`layers.run_layers`). The intermediates are `image_embeds`
        (None without images), `embedded` (the decoder's input), `hidden` (after the final norm) and `layers` (see
        `Decoder`).
        """
        image_embeds = None if images is None else self.encode_images(images, remat=remat)
        x = self.embed(tokens, image_embeds)
        batch, length, _ = x.shape
        num_image_tokens = length - tokens.shape[1]
        if segment_ids is None:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
            mask = Causal()
        else:
            # The image is part of the shared prefix.
            zeros = jnp.zeros((batch, num_image_tokens), segment_ids.dtype)
            segment_ids = jnp.concatenate([segment_ids[:, :1], zeros, segment_ids[:, 1:]], axis=1)
            positions, mask = segment_positions(segment_ids), segment_mask(segment_ids)
        hidden, _, layers = self.language(x, positions, mask, rank_mask=rank_mask, remat=remat)
        intermediates = {"image_embeds": image_embeds, "embedded": x, "hidden": hidden, "layers": layers}
        # The last `text` positions: the image's last position predicts the token after BOS in place of BOS itself.
        return self.language.logits(hidden[:, num_image_tokens:]), intermediates


def bind(graph: nnx.GraphDef[Module], params: dict[str, Any]) -> Module:
    """The module of `graph` with `params` (nested dicts of arrays) as its parameters."""
    return nnx.merge(graph, nnx.State(params))
