"""The decoder's parameters under their published names.

Four styles hold the same numbers:

- `sparse`: LLaMA2-Accessory's `mixtral_sparse*`. The experts of a layer are one tensor, whose hidden
  dimension is divided over the shards; w2 is stored transposed.
- `mistral_sparse`: the same under other names, as in the `.pt` files that Mistral put on Hugging Face.
- `base`: LLaMA2-Accessory's `mixtral` and Mistral's first release. One tensor per expert and matrix, experts
  assigned to the shards.
- `hugging_face`: transformers' Mixtral. As `base`, but rotary embedding rotates halves of a head, not pairs.

Published matrices are [out, in], parameters [in, ..., out].
"""

from collections.abc import Iterator
from typing import Literal

from sphinx_jax.checkpoints.mapping.param_mapping import Index, ParamMapping
from sphinx_jax.config import DecoderConfig

ALL = slice(None)

Style = Literal["sparse", "base", "mistral_sparse", "hugging_face"]

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


def language_mappings(config: DecoderConfig, style: Style, *, unstacked: bool, prefix: str = "") -> list[ParamMapping]:
    """Mappings of every parameter of the decoder, in the order of the original program.

    `unstacked`: the parameters' layers are a list, not stacked; `prefix` is prepended to every published name.
    """
    names = _NAMES[style]
    dim, vocab = config.dim, config.vocab_size
    mappings = [
        ParamMapping(
            prefix + names["embedding"], (vocab, dim), ("language", "embedding", "table"), (), (vocab, dim), (0, 1), 1
        )
    ]
    for i in range(config.num_layers):
        path = ("language", "layers", i) if unstacked else ("language", "layers")
        mappings += _layer_mappings(config, style, prefix + names["layer"].format(i), path, () if unstacked else (i,))
    mappings += [
        ParamMapping(prefix + names["norm"], (dim,), ("language", "norm", "scale"), (), (dim,), (0,)),
        ParamMapping(prefix + names["head"], (vocab, dim), ("language", "head", "kernel"), (), (vocab, dim), (1, 0), 0),
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
        if rotary and style == "hugging_face":
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
    up_shape, down_shape = (hidden, dim), (dim, hidden)
    for e in range(experts):
        gate, up, down = (*index, e, ALL, 0, ALL), (*index, e, ALL, 1, ALL), (*index, e)
        yield ParamMapping(f"{stem}{e}.w1.weight", up_shape, w_in, gate, up_shape, (1, 0), expert=(e, experts))
        yield ParamMapping(f"{stem}{e}.w2.weight", down_shape, w_out, down, down_shape, (1, 0), expert=(e, experts))
        yield ParamMapping(f"{stem}{e}.w3.weight", up_shape, w_in, up, up_shape, (1, 0), expert=(e, experts))
