"""Floating-point operations and bytes of the model, counted from its config and its layout.

A parameter that multiplies n rows costs 2 n operations for each of its elements; attention costs 4 operations for
each pair of query and key and each channel of a head. Norms, activations and softmax are left out, as usual. The
share of one device follows from how the rules table splits each parameter: what is split over the model-parallel
axes is computed in parts, what is copied is computed by every device. Experts are taken to be chosen evenly.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sharding import DEFAULT_RULES, Rules, partition_spec
from sphinx_jax.config import SphinxConfig, VisionConfig
from sphinx_jax.kernels.quantized import Quantized

Path = tuple[str | int, ...]


class Work(NamedTuple):
    """What a job asks of the model: `sequences` of `length` positions, each looked at against `keys` positions.

    `scored` positions of each sequence get scores over the vocabulary; `pictures` are encoded.
    """

    sequences: int
    length: int
    keys: int
    scored: int
    pictures: int = 0


class Cost(NamedTuple):
    """Of all devices together, and of the busiest one."""

    total: float
    busiest: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.total + other.total, self.busiest + other.busiest)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.total * factor, self.busiest * factor)


def forward_flops(
    config: SphinxConfig, params: Any, mesh: Mesh, work: Work, rules: Rules = DEFAULT_RULES
) -> dict[str, Cost]:
    """Operations of one forward pass: "language", and "vision" where there are pictures.

    `params` are the model's abstract parameters on `mesh` (`sharding.abstract_params`), layers stacked or apart.
    """
    language = config.language
    batch = _batch_split(work.sequences, mesh, rules)
    pairs = work.sequences * work.length * work.keys
    attended = 4.0 * pairs * language.num_heads * language.head_dim * language.num_layers
    heads = partition_spec(("kv_heads", "queries"), (language.num_kv_heads, language.queries_per_kv), mesh, rules)
    products = _products(config, {"language": params["language"]}, work, work.sequences, batch, mesh)
    costs = {"language": products + _split(attended, _factor(heads, mesh) * batch)}
    if config.vision is not None and work.pictures:
        costs["vision"] = _vision_flops(config, params["vision"], mesh, work, rules)
    return costs


def decode_bytes(
    config: SphinxConfig, params: Any, mesh: Mesh, rows: int, keys: int, rules: Rules = DEFAULT_RULES
) -> Cost:
    """Bytes that must be read from memory to decode one token for each of `rows`: weights at work, and the cache.

    Each row chooses its experts independently; an expert that several rows chose is read once.
    """
    language = config.language
    own_rows = rows / _batch_split(rows, mesh, rules)
    chosen = lambda n: 1 - (1 - language.experts_per_token / language.num_experts) ** n
    total = busiest = 0.0
    for path, leaf in _with_paths(params["language"]):
        if path[0] == "embedding":
            continue
        is_expert = path[-1] in ("w_in", "w_out")
        size = sum(math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(leaf)) / 8
        total += size * (chosen(rows) if is_expert else 1)
        busiest += size / _model_split(leaf, mesh) * (chosen(own_rows) if is_expert else 1)
    itemsize = params["language"]["embedding"]["table"].dtype.itemsize
    cached = 2.0 * language.num_layers * keys * language.num_kv_heads * language.head_dim * itemsize
    kv = partition_spec(("kv_heads",), (language.num_kv_heads,), mesh, rules)
    return Cost(total + rows * cached, busiest + own_rows * cached / _factor(kv, mesh))


def fraction_of_parameters(params: Any) -> float:
    """The part of all parameters that the busiest device holds."""
    leaves = [leaf for _, leaf in _with_paths(params)]
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return held / sum(math.prod(leaf.shape) for leaf in leaves)


def _products(config: SphinxConfig, params: Any, work: Work, items: int, batch: int, mesh: Mesh) -> Cost:
    """Products with parameters, for `items` sequences or views of which each device has 1 / `batch`."""
    total = busiest = 0.0
    for path, leaf in _with_paths(params):
        flops = 2.0 * math.prod(leaf.shape) * items * _rows(config, path, work)
        total += flops
        busiest += flops / (_model_split(leaf, mesh) * batch)
    return Cost(total, busiest)


def _rows(config: SphinxConfig, path: Path, work: Work) -> float:
    """How many rows a parameter multiplies, for each sequence or each view."""
    leaf = path[-1]
    if path[0] == "language":
        if path[1] == "head":
            return work.scored
        if leaf in ("wqkv", "wo", "router"):
            return work.length
        if leaf in ("w_in", "w_out"):
            return work.length * config.language.experts_per_token / config.language.num_experts
        return 0
    return _vision_rows(config, path)


def _vision_rows(config: SphinxConfig, path: Path) -> float:
    """Rows a view. Vectors (biases, norms, scales, class tokens) and positions multiply nothing."""
    vision, leaf = config.vision, path[-1]
    if leaf not in ("kernel", "qkv", "out", "q", "kv", "gate_up", "depthwise"):
        return 0
    if path[1] == "visual_proj":
        return vision.num_patch_tokens
    if path[1] == "qformer_proj":
        return vision.qformer.num_queries
    encoder = getattr(vision, path[1])
    if path[1] == "convnext":
        stage = int(path[3]) if path[2] == "stages" else 0
        return (encoder.image_size // (4 * 2**stage)) ** 2
    patches = (encoder.image_size // encoder.patch) ** 2
    if "patches" in path:
        return patches
    if path[1] == "qformer" and path[2] == "groups":
        return patches + 1 if leaf == "kv" else encoder.num_queries
    return patches + 1


def _vision_flops(config: SphinxConfig, params: Any, mesh: Mesh, work: Work, rules: Rules) -> Cost:
    vision = config.vision
    num_crops = work.pictures * vision.num_crops
    batch = _batch_split(num_crops, mesh, rules)
    cost = _products(config, {"vision": params}, work, num_crops, batch, mesh)
    for layers, queries, keys, width, heads in _vision_attention(vision):
        split = _factor(partition_spec(("vision_heads",), (heads,), mesh, rules), mesh)
        cost += _split(4.0 * num_crops * layers * queries * keys * width, split * batch)
    return cost


def _vision_attention(vision: VisionConfig) -> list[tuple[int, int, int, int, int]]:
    """(layers, queries, keys, channels of all heads, heads) of each kind of attention in the encoders."""
    found = []
    for encoder in filter(None, (vision.clip, vision.dino)):
        tokens = (encoder.image_size // encoder.patch) ** 2 + 1
        found.append((encoder.num_layers, tokens, tokens, encoder.width, encoder.num_heads))
    if q := vision.qformer:
        tokens, crosses = (q.image_size // q.patch) ** 2 + 1, q.num_layers // q.cross_attention_every
        found.append((q.vision_layers, tokens, tokens, q.vision_width, q.vision_heads))
        found.append((q.num_layers, q.num_queries, q.num_queries, q.width, q.num_heads))
        found.append((crosses, q.num_queries, tokens, q.width, q.num_heads))
    return found


def _batch_split(count: int, mesh: Mesh, rules: Rules) -> int:
    """Over how many devices a batch of `count` is split."""
    return _factor(partition_spec(("batch",), (count,), mesh, rules), mesh)


def _model_split(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> int:
    """Into how many parts the products with a parameter are cut; what fsdp splits is gathered before use."""
    return math.prod(mesh.shape[axis] for axis in _axes(leaf.sharding.spec) if axis not in ("data", "fsdp"))


def _axes(partition: jax.sharding.PartitionSpec) -> list[str]:
    return [axis for part in partition if part for axis in ((part,) if isinstance(part, str) else part)]


def _factor(partition: jax.sharding.PartitionSpec, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(partition))


def _split(flops: float, parts: int) -> Cost:
    return Cost(flops, flops / parts)


def _with_paths(tree: Any) -> list[tuple[Path, jax.ShapeDtypeStruct | Quantized]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Quantized))
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]
