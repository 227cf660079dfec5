"""The decoder's parameters under their published names.

Five styles hold the same numbers:

- `sparse`: LLaMA2-Accessory's `mixtral_sparse*`. The experts of a layer are one tensor, whose hidden
  dimension is divided over the shards; w2 is stored transposed.
- `mistral_sparse`: the same under other names, as in the `.pt` files that Mistral put on Hugging Face.
- `base`: LLaMA2-Accessory's `mixtral` and Mistral's first release. One tensor per expert and matrix, experts
  assigned to the shards.
- `hugging_face`: transformers' Mixtral. As `base`, but rotary embedding rotates halves of a head, not pairs.
- `hugging_face_fused`: the same as transformers 5 holds it in memory. The experts of a layer are one tensor for gate
  and up projection and one for the down projection.

Published matrices are [out, in], parameters [in, ..., out].
"""

import math
from collections.abc import Iterator
from typing import Literal

from sphinx_jax.checkpoints.mapping.param_mapping import Index, ParamMapping
from sphinx_jax.config import DecoderConfig

ALL = slice(None)

EMBEDDING, HEAD = ("language", "embedding", "table"), ("language", "head", "kernel")
"""The parameters with a dimension of `padded_vocab_size`."""


def vocab_index(config: DecoderConfig, path: tuple[str | int, ...]) -> Index:
    """The index that selects what files hold of the array at `path`: all but the padding of the vocabulary.

    The path is that of a parameter, or of one of the arrays of a quantized one.
    """
    param = path[: len(HEAD)]
    if param not in (EMBEDDING, HEAD) or config.padded_vocab_size == config.vocab_size:
        return ()
    tokens = slice(0, config.vocab_size)
    return (tokens,) if param == EMBEDDING else (ALL, tokens)


def unpadded_shape(config: DecoderConfig, path: tuple[str | int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that files hold of the array of `shape` at `path`."""
    index = vocab_index(config, path)
    return tuple(
        len(range(size)[index[i]]) if i < len(index) else size  # pyright: ignore[reportArgumentType]
        for i, size in enumerate(shape)
    )


def vocab_padding(config: DecoderConfig, path: tuple[str | int, ...], shape: tuple[int, ...]) -> int:
    """Elements of the array of `shape` at `path` that are padding of the vocabulary."""
    return math.prod(shape) - math.prod(unpadded_shape(config, path, shape))


Style = Literal["sparse", "base", "mistral_sparse", "hugging_face", "hugging_face_fused"]

_NAMES: dict[str, dict[str, str]] = {
    "sparse": {
        "embedding": "tok_embeddings.weight",
        "head": "output.weight",
        "norm": "norm.weight",
        "layer": "layers.{}.",
        "q": "attention.wq.weight",
        "k": "attention.wk.weight",
        "v": "attention.wv.weight",
        "o": "attention.wo.weight",
        "attention_norm": "attention_norm.weight",
        "ffn_norm": "ffn_norm.weight",
        "router": "feed_forward.gate.weight",
        "experts": "feed_forward.",
    },
}
_NAMES["base"] = _NAMES["sparse"] | {"experts": "feed_forward.experts."}
_NAMES["mistral_sparse"] = _NAMES["sparse"] | {
    "router": "block_sparse_moe.gate.weight",
    "experts": "block_sparse_moe.",
}
_NAMES["hugging_face"] = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "layer": "model.layers.{}.",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "router": "block_sparse_moe.gate.weight",
    "experts": "block_sparse_moe.experts.",
}
_NAMES["hugging_face_fused"] = _NAMES["hugging_face"] | {"router": "mlp.gate.weight", "experts": "mlp.experts."}


def language_mappings(config: DecoderConfig, style: Style, *, unstacked: bool, prefix: str = "") -> list[ParamMapping]:
    """Mappings of every parameter of the decoder, in the order of the original program.

    `unstacked`: the parameters' layers are a list, not stacked; `prefix` is prepended to every published name.
    """
    names = _NAMES[style]
    table = (config.vocab_size, config.dim)
    # Files hold no padding: it is the end of these parameters and stays zero.
    rows, columns = vocab_index(config, EMBEDDING), vocab_index(config, HEAD)
    mappings = [ParamMapping(prefix + names["embedding"], table, EMBEDDING, rows, table, (0, 1), 1)]
    for i in range(config.num_layers):
        path = ("language", "layers", i) if unstacked else ("language", "layers")
        mappings += _layer_mappings(config, style, prefix + names["layer"].format(i), path, () if unstacked else (i,))
    mappings += [
        ParamMapping(prefix + names["norm"], table[1:], ("language", "norm", "scale"), (), table[1:], (0,)),
        ParamMapping(prefix + names["head"], table, HEAD, columns, table, (1, 0), 0),
    ]
    return mappings


def _layer_mappings(
    config: DecoderConfig, style: Style, prefix: str, path: tuple[str | int, ...], index: Index
) -> Iterator[ParamMapping]:
    names, dim = _NAMES[style], config.dim
    kv, group, width = config.num_kv_heads, config.queries_per_kv, config.head_dim

    def projection(matrix: str, columns: int | slice, heads: tuple[int, ...], rotary: bool) -> ParamMapping:
        out_dim = (kv * group if len(heads) == 2 else kv) * width
        qkv_index = (*index, ALL, ALL, columns, ALL)
        dims = len(heads)
        if rotary and style in ("hugging_face", "hugging_face_fused"):
            # transformers rotates elements i and i + width / 2 of a head together; here it is 2i and 2i + 1.
            view, order = (*heads, 2, width // 2, dim), (dims + 2, *range(dims), (dims + 1, dims))
        else:
            view, order = (*heads, width, dim), (dims + 1, *range(dims), dims)
        return ParamMapping(
            prefix + names[matrix], (out_dim, dim), (*path, "attention", "wqkv"), qkv_index, view, order, 0
        )

    yield projection("q", slice(0, group), (kv, group), rotary=True)
    yield projection("k", group, (kv,), rotary=True)
    yield projection("v", group + 1, (kv,), rotary=False)
    yield ParamMapping(
        prefix + names["o"],
        (dim, kv * group * width),
        (*path, "attention", "wo"),
        index,
        (dim, kv, group, width),
        (1, 2, 3, 0),
        1,
    )
    yield from _expert_mappings(config, style, prefix + names["experts"], (*path, "ffn"), index)
    yield ParamMapping(
        prefix + names["router"],
        (config.num_experts, dim),
        (*path, "ffn", "router"),
        index,
        (config.num_experts, dim),
        (1, 0),
    )
    for norm in ("attention_norm", "ffn_norm"):
        yield ParamMapping(prefix + names[norm], (dim,), (*path, norm, "scale"), index, (dim,), (0,))


def _expert_mappings(
    config: DecoderConfig, style: Style, stem: str, path: tuple[str | int, ...], index: Index
) -> Iterator[ParamMapping]:
    experts, dim, hidden = config.num_experts, config.dim, config.hidden_dim
    w_in, w_out = (*path, "w_in"), (*path, "w_out")
    if style in ("sparse", "mistral_sparse"):
        shape, view = (experts * hidden, dim), (experts, hidden, dim)
        gate, up = (*index, ALL, ALL, 0, ALL), (*index, ALL, ALL, 1, ALL)
        yield ParamMapping(stem + "w1", shape, w_in, gate, view, (0, 2, 1), 1)
        yield ParamMapping(stem + "w2", shape, w_out, index, view, (0, 1, 2), 1)
        yield ParamMapping(stem + "w3", shape, w_in, up, view, (0, 2, 1), 1)
        return
    if style == "hugging_face_fused":
        view = (experts, 2, hidden, dim)
        yield ParamMapping(stem + "gate_up_proj", (experts, 2 * hidden, dim), w_in, index, view, (0, 3, 1, 2))
        yield ParamMapping(stem + "down_proj", (experts, dim, hidden), w_out, index, (experts, dim, hidden), (0, 2, 1))
        return
    up_shape, down_shape = (hidden, dim), (dim, hidden)
    for e in range(experts):
        gate, up, down = (*index, e, ALL, 0, ALL), (*index, e, ALL, 1, ALL), (*index, e)
        yield ParamMapping(f"{stem}{e}.w1.weight", up_shape, w_in, gate, up_shape, (1, 0), expert=(e, experts))
        yield ParamMapping(f"{stem}{e}.w2.weight", down_shape, w_out, down, down_shape, (1, 0), expert=(e, experts))
        yield ParamMapping(f"{stem}{e}.w3.weight", up_shape, w_in, up, up_shape, (1, 0), expert=(e, experts))
