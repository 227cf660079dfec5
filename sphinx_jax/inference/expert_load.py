"""How many tokens the router of each layer sends to each expert: image and text tokens are counted separately,
teacher-forced."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sphinx_jax.inference.prompt_logprobs import padded_len
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.model import bind

KINDS = ("image", "text")


def count(
    graph: nnx.GraphDef,
    params: dict[str, Any],
    tokens: Int[Array, "batch text"],
    lengths: Int[Array, "batch"],
    images: Float[Array, "batch size size 3"] | None,
    rank_mask: Float[Array, "batch rank"] | None = None,
) -> Int[Array, "layers kinds experts"]:
    """Assignments of tokens to experts, k for each token; kinds as in KINDS. Tokens from `lengths` on are padding."""
    model = bind(graph, params)
    x = model.embed(tokens, None if images is None else model.encode_images(images))
    batch, length, _ = x.shape
    num_image_tokens = length - tokens.shape[1]
    position = jnp.arange(length)[None]
    positions = jnp.broadcast_to(position, (batch, length))
    _, _, layers = model.language(x, positions, Causal(), rank_mask=rank_mask)
    # The image is inserted after BOS.
    is_image = (position >= 1) & (position <= num_image_tokens)
    is_real = (lengths[:, None] > 0) & (position < lengths[:, None] + num_image_tokens)
    kinds = jnp.stack([is_real & is_image, is_real & ~is_image])

    def of_layer(experts: Int[Array, "batch length k"], num_experts: int) -> Int[Array, "kinds experts"]:
        selected = experts[..., None] == jnp.arange(num_experts)
        return jnp.einsum("nbl,blke->ne", kinds.astype(jnp.int32), selected.astype(jnp.int32))

    return jnp.stack([of_layer(layer["routing"].experts, layer["routing"].logits.shape[-1]) for layer in layers])


def padded_batch(texts: Sequence[Sequence[int]], size: int) -> tuple[Int[np.ndarray, "size text"], np.ndarray]:
    """Tokens and lengths of the texts as `count` takes them, with empty rows up to `size`."""
    tokens = np.zeros((size, padded_len(max(map(len, texts)))), np.int32)
    lengths = np.zeros(size, np.int32)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], lengths[i] = text, len(text)
    return tokens, lengths
