"""The vision encoders' parameters under their published names.

The names are those of the libraries that the original program took its encoders from: OpenCLIP, timm's
ConvNeXt inside OpenCLIP, DINOv2, and transformers' BLIP-2. Published matrices are [out, in] and
convolutions [out, in, height, width]; parameters are [in, ..., out] and [height, width, in, out]. These tensors
are replicated in every shard.
"""

import math
from collections.abc import Iterator

from sphinx_jax.checkpoints.mapping.param_mapping import Index, ParamMapping
from sphinx_jax.config import ClipConfig, ConvNextConfig, DinoConfig, QFormerConfig, VisionConfig

Path = tuple[str | int, ...]
Mappings = Iterator[ParamMapping]

_ROOT = "llma."
_ALL = slice(None)
_CLIP, _CONVNEXT, _DINO = _ROOT + "clip.", _ROOT + "openclip_convnext_xxl.", _ROOT + "dinov2_vitg14."
_QFORMER = _ROOT + "qformer."

# Present in published files and never used: CLIP's text half and its projection into the space that text
# and images share, and the token that DINOv2 substitutes for masked patches.
_IGNORED = frozenset(
    [
        *(_CLIP + name for name in ("positional_embedding", "text_projection", "logit_scale", "visual.proj")),
        *(_CLIP + name for name in ("token_embedding.weight", "ln_final.weight", "ln_final.bias")),
        _DINO + "mask_token",
    ]
)


def is_ignored_vision_name(name: str) -> bool:
    """Whether a published tensor belongs to an encoder and no parameter needs it."""
    return name in _IGNORED


def vision_mappings(config: VisionConfig, dim: int) -> list[ParamMapping]:
    """Mappings of every parameter of `Ensemble(config, dim)` in a SphinxMoE, in the order of the original program."""
    vision: Path = ("vision",)
    mappings = [_flat(_ROOT + f"{which}_img", (1, 1, dim), (*vision, which)) for which in ("start", "end")]
    if config.qformer:
        mappings += _qformer(config.qformer, (*vision, "qformer"))
    if config.clip:
        mappings += _clip(config.clip, (*vision, "clip"))
    if config.convnext:
        mappings += _convnext(config.convnext, (*vision, "convnext"))
    if config.dino:
        mappings += _dino(config.dino, (*vision, "dino"))
    if config.qformer:
        mappings += _linear(_ROOT + "qformer_proj.0", config.qformer.width, dim, (*vision, "qformer_proj"))
        mappings += _norm(_ROOT + "qformer_proj.1", dim, (*vision, "qformer_norm"))
    if config.ensemble_channels:
        mappings += _linear(_ROOT + "visual_proj.0", config.ensemble_channels, dim, (*vision, "visual_proj"))
        mappings += _norm(_ROOT + "visual_proj.1", dim, (*vision, "visual_norm"))
    return mappings


def _clip(config: ClipConfig, path: Path) -> Mappings:
    width, heads, visual = config.width, config.num_heads, _CLIP + "visual."
    positions = (config.image_size // config.patch) ** 2 + 1
    tokens, blocks = (*path, "tokens"), (*path, "blocks")
    yield _flat(visual + "class_embedding", (width,), (*tokens, "class_token"))
    yield _rows(visual + "positional_embedding", (positions, width), (*tokens, "positions"))
    yield _kernel(visual + "conv1.weight", width, 3, config.patch, (*tokens, "patches", "kernel"))
    yield from _norm(visual + "ln_pre", width, (*path, "norm_pre"))
    for i in range(config.num_layers):
        name, attention = f"{visual}transformer.resblocks.{i}.", (*blocks, "attention")
        yield from _norm(name + "ln_1", width, (*blocks, "norm1"), (i,))
        yield from _fused_qkv(name + "attn.in_proj_{}", width, heads, attention, (i,))
        yield from _attention_out(name + "attn.out_proj", width, heads, attention, (i,))
        yield from _norm(name + "ln_2", width, (*blocks, "norm2"), (i,))
        yield from _linear(name + "mlp.c_fc", width, 4 * width, (*blocks, "mlp", "fc1"), (i,))
        yield from _linear(name + "mlp.c_proj", 4 * width, width, (*blocks, "mlp", "fc2"), (i,))
    yield from _norm(visual + "ln_post", width, (*path, "norm_post"))


def _convnext(config: ConvNextConfig, path: Path) -> Mappings:
    yield from _patchify(_CONVNEXT + "stem.0", config.dims[0], 3, 4, (*path, "stem"))
    yield from _norm(_CONVNEXT + "stem.1", config.dims[0], (*path, "stem_norm"))
    for s, (dim, depth) in enumerate(zip(config.dims, config.depths, strict=True)):
        name, stage = f"{_CONVNEXT}stages.{s}.", (*path, "stages", s)
        if s > 0:
            yield from _norm(name + "downsample.0", config.dims[s - 1], (*stage, "norm"))
            yield from _patchify(name + "downsample.1", dim, config.dims[s - 1], 2, (*stage, "downsample"))
        for i in range(depth):
            yield from _convnext_block(f"{name}blocks.{i}.", dim, config.kernel, (*stage, "blocks"), (i,))
    yield from _norm(_CONVNEXT + "head.norm", config.dims[-1], (*path, "norm"))


def _convnext_block(name: str, dim: int, k: int, path: Path, index: Index) -> Mappings:
    yield _flat(name + "gamma", (dim,), (*path, "gamma"), index)
    yield ParamMapping(name + "conv_dw.weight", (dim, 1, k, k), (*path, "depthwise"), index, (dim, k, k), (1, 2, 0))
    yield _flat(name + "conv_dw.bias", (dim,), (*path, "depthwise_bias"), index)
    yield from _norm(name + "norm", dim, (*path, "norm"), index)
    yield from _linear(name + "mlp.fc1", dim, 4 * dim, (*path, "mlp", "fc1"), index)
    yield from _linear(name + "mlp.fc2", 4 * dim, dim, (*path, "mlp", "fc2"), index)


def _dino(config: DinoConfig, path: Path) -> Mappings:
    width, heads, hidden = config.width, config.num_heads, config.hidden_dim
    tokens, blocks = (*path, "tokens"), (*path, "blocks")
    yield _flat(_DINO + "cls_token", (1, 1, width), (*tokens, "class_token"))
    yield _rows(_DINO + "pos_embed", (1, config.position_grid**2 + 1, width), (*tokens, "positions"))
    yield from _patchify(_DINO + "patch_embed.proj", width, 3, config.patch, (*tokens, "patches"))
    for i in range(config.num_layers):
        name, attention, mlp = f"{_DINO}blocks.{i}.", (*blocks, "attention"), (*blocks, "mlp")
        yield from _norm(name + "norm1", width, (*blocks, "norm1"), (i,))
        yield from _fused_qkv(name + "attn.qkv.{}", width, heads, attention, (i,))
        yield from _attention_out(name + "attn.proj", width, heads, attention, (i,))
        yield _flat(name + "ls1.gamma", (width,), (*blocks, "scale1"), (i,))
        yield from _norm(name + "norm2", width, (*blocks, "norm2"), (i,))
        shape, view = (2 * hidden, width), (2, hidden, width)
        yield ParamMapping(name + "mlp.w12.weight", shape, (*mlp, "gate_up"), (i,), view, (2, 0, 1))
        yield ParamMapping(name + "mlp.w12.bias", shape[:1], (*mlp, "gate_up_bias"), (i,), view[:2], (0, 1))
        yield from _linear(name + "mlp.w3", hidden, width, (*mlp, "down"), (i,))
        yield _flat(name + "ls2.gamma", (width,), (*blocks, "scale2"), (i,))
    yield from _norm(_DINO + "norm", width, (*path, "norm"))


def _qformer(config: QFormerConfig, path: Path) -> Mappings:
    yield _rows(_QFORMER + "query_tokens", (1, config.num_queries, config.width), (*path, "queries"))
    yield from _eva(config, (*path, "vit"))
    name, width, heads = _QFORMER + "qformer.", config.width, config.num_heads
    yield from _norm(name + "layernorm", width, (*path, "norm"))
    for i in range(config.num_layers):
        # Layers of the same position in their group are one stack.
        group, position = divmod(i, config.cross_attention_every)
        layer, layer_path, index = f"{name}encoder.layer.{i}.", (*path, "groups", "layers", position), (group,)
        attention, cross = (*layer_path, "attention"), (*layer_path, "cross")
        for c, which in enumerate(("query", "key", "value")):
            own = f"{layer}attention.attention.{which}"
            yield from _heads(own, width, width, heads, attention, ("qkv", "qkv_bias"), index, c)
        yield from _attention_out(layer + "attention.output.dense", width, heads, attention, index)
        yield from _norm(layer + "attention.output.LayerNorm", width, (*layer_path, "attention_norm"), index)
        if position == 0:
            own = layer + "crossattention.attention."
            yield from _heads(own + "query", width, width, heads, cross, ("q", "q_bias"), index)
            for c, which in enumerate(("key", "value")):
                yield from _heads(own + which, config.vision_width, width, heads, cross, ("kv", "kv_bias"), index, c)
            yield from _attention_out(layer + "crossattention.output.dense", width, heads, cross, index)
            yield from _norm(layer + "crossattention.output.LayerNorm", width, (*layer_path, "cross_norm"), index)
        yield from _linear(layer + "intermediate_query.dense", width, config.mlp, (*layer_path, "mlp", "fc1"), index)
        yield from _linear(layer + "output_query.dense", config.mlp, width, (*layer_path, "mlp", "fc2"), index)
        yield from _norm(layer + "output_query.LayerNorm", width, (*layer_path, "mlp_norm"), index)


def _eva(config: QFormerConfig, path: Path) -> Mappings:
    width, heads, mlp, name = config.vision_width, config.vision_heads, config.vision_mlp, _QFORMER + "vision_model."
    positions = (config.image_size // config.patch) ** 2 + 1
    tokens, blocks = (*path, "tokens"), (*path, "blocks")
    yield _flat(name + "embeddings.class_embedding", (1, 1, width), (*tokens, "class_token"))
    yield _rows(name + "embeddings.position_embedding", (1, positions, width), (*tokens, "positions"))
    yield from _patchify(name + "embeddings.patch_embedding", width, 3, config.patch, (*tokens, "patches"))
    for i in range(config.vision_layers):
        layer, attention = f"{name}encoder.layers.{i}.", (*blocks, "attention")
        yield from _fused_qkv(layer + "self_attn.qkv.{}", width, heads, attention, (i,))
        yield from _attention_out(layer + "self_attn.projection", width, heads, attention, (i,))
        yield from _norm(layer + "layer_norm1", width, (*blocks, "norm1"), (i,))
        yield from _linear(layer + "mlp.fc1", width, mlp, (*blocks, "mlp", "fc1"), (i,))
        yield from _linear(layer + "mlp.fc2", mlp, width, (*blocks, "mlp", "fc2"), (i,))
        yield from _norm(layer + "layer_norm2", width, (*blocks, "norm2"), (i,))
    yield from _norm(name + "post_layernorm", width, (*path, "norm"))


def _flat(name: str, shape: tuple[int, ...], path: Path, index: Index = ()) -> ParamMapping:
    """A one-dimensional parameter, published with any number of dimensions of 1."""
    return ParamMapping(name, shape, path, index, (math.prod(shape),), (0,))


def _rows(name: str, shape: tuple[int, ...], path: Path) -> ParamMapping:
    """A parameter [rows, channels], published with any number of leading dimensions of 1."""
    return ParamMapping(name, shape, path, (), shape[-2:], (0, 1))


def _norm(name: str, dim: int, path: Path, index: Index = ()) -> Mappings:
    yield _flat(name + ".weight", (dim,), (*path, "scale"), index)
    yield _flat(name + ".bias", (dim,), (*path, "bias"), index)


def _linear(name: str, in_dim: int, out_dim: int, path: Path, index: Index = ()) -> Mappings:
    shape = (out_dim, in_dim)
    yield ParamMapping(name + ".weight", shape, (*path, "kernel"), index, shape, (1, 0))
    yield _flat(name + ".bias", (out_dim,), (*path, "bias"), index)


def _kernel(name: str, out_dim: int, in_dim: int, patch: int, path: Path) -> ParamMapping:
    shape = (out_dim, in_dim, patch, patch)
    return ParamMapping(name, shape, path, (), shape, (2, 3, 1, 0))


def _patchify(name: str, out_dim: int, in_dim: int, patch: int, path: Path) -> Mappings:
    yield _kernel(name + ".weight", out_dim, in_dim, patch, (*path, "kernel"))
    yield _flat(name + ".bias", (out_dim,), (*path, "bias"))


def _fused_qkv(name: str, width: int, heads: int, path: Path, index: Index) -> Mappings:
    """Queries, keys and values of all heads, concatenated; `name` is formatted with "weight" or "bias"."""
    view = (3, heads, width // heads, width)
    yield ParamMapping(name.format("weight"), (3 * width, width), (*path, "qkv"), index, view, (3, 0, 1, 2))
    yield ParamMapping(name.format("bias"), (3 * width,), (*path, "qkv_bias"), index, view[:3], (0, 1, 2))


def _heads(
    name: str,
    in_dim: int,
    width: int,
    heads: int,
    path: Path,
    params: tuple[str, str],
    index: Index,
    c: int | None = None,
) -> Mappings:
    """One of queries, keys and values; `c` is its index in a parameter that holds several."""
    view = (heads, width // heads, in_dim)
    kernel, bias = params
    kernel_index, bias_index = (index, index) if c is None else ((*index, _ALL, c), (*index, c))
    yield ParamMapping(name + ".weight", (width, in_dim), (*path, kernel), kernel_index, view, (2, 0, 1))
    yield ParamMapping(name + ".bias", (width,), (*path, bias), bias_index, view[:2], (0, 1))


def _attention_out(name: str, width: int, heads: int, path: Path, index: Index) -> Mappings:
    view = (width, heads, width // heads)
    yield ParamMapping(name + ".weight", (width, width), (*path, "out"), index, view, (1, 2, 0))
    yield _flat(name + ".bias", (width,), (*path, "out_bias"), index)
