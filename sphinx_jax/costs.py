"""Floating-point operations and bytes of the model, counted from its config and its shardings.

A parameter that multiplies n rows costs 2 n operations per element; attention costs 4 operations per query, key and
channel of a head. Norms, activations and softmax are not counted, as is usual. The cost per device follows from the
sharding of each parameter: what is sharded over the model-parallel axes is computed in parts, what is replicated is
computed by every device. Routing is taken to be balanced.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from sharding import DEFAULT_RULES, Rules, partition_spec
from sphinx_jax.config import SphinxConfig, VisionConfig
from sphinx_jax.kernels.quantized import Quantized

Path = tuple[str | int, ...]


class Workload(NamedTuple):
    """One forward pass: `num_seqs` sequences of `length` positions, each of which attends to `num_keys` positions.

    The output head computes logits for `num_logits` positions of each sequence; `num_images` images are encoded.
    """

    num_seqs: int
    length: int
    num_keys: int
    num_logits: int
    num_images: int = 0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations or bytes: the sum over all devices, and the maximum of one device."""

    total: float
    per_device_max: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.total + other.total, self.per_device_max + other.per_device_max)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.total * factor, self.per_device_max * factor)


def forward_flops(
    config: SphinxConfig, params: Any, mesh: Mesh, workload: Workload, rules: Rules = DEFAULT_RULES
) -> dict[str, Cost]:
    """Operations of one forward pass: "language", and "vision" if there are images.

    `params` are the model's abstract parameters on `mesh` (`sharding.abstract_params`), with stacked or unstacked
    layers.
    """
    language = config.language
    batch_shards = _batch_shards(workload.num_seqs, mesh, rules)
    pairs = workload.num_seqs * workload.length * workload.num_keys
    attention = 4.0 * pairs * language.num_heads * language.head_dim * language.num_layers
    heads = partition_spec(("kv_heads", "queries"), (language.num_kv_heads, language.queries_per_kv), mesh, rules)
    products = _products(config, {"language": params["language"]}, workload, workload.num_seqs, batch_shards, mesh)
    costs = {"language": products + _sharded(attention, _num_shards(heads, mesh) * batch_shards)}
    if config.vision is not None and workload.num_images:
        costs["vision"] = _vision_flops(config, config.vision, params["vision"], mesh, workload, rules)
    return costs


def decode_bytes(
    config: SphinxConfig, params: Any, mesh: Mesh, num_seqs: int, cache_len: int, rules: Rules = DEFAULT_RULES
) -> Cost:
    """Bytes read from device memory by one decode step of `num_seqs` sequences: active parameters and KV cache.

    Each sequence selects its experts independently; the weights of an expert that several select are read once.
    `cache_len` is the number of cache positions that each sequence attends to.
    """
    language = config.language
    seqs_per_device = num_seqs / _batch_shards(num_seqs, mesh, rules)

    def fraction_of_experts(n: int | float) -> float:
        """The expected fraction of experts that at least one of n tokens selects."""
        return 1 - (1 - language.experts_per_token / language.num_experts) ** n

    total = per_device_max = 0.0
    for path, leaf in _with_paths(params["language"]):
        if path[0] == "embedding":
            continue
        is_expert = path[-1] in ("w_in", "w_out")
        size = sum(math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(leaf)) / 8
        total += size * (fraction_of_experts(num_seqs) if is_expert else 1)
        per_device_max += size / _model_shards(leaf, mesh) * (fraction_of_experts(seqs_per_device) if is_expert else 1)
    itemsize = params["language"]["embedding"]["table"].dtype.itemsize
    kv_bytes = 2.0 * language.num_layers * cache_len * language.num_kv_heads * language.head_dim * itemsize
    kv_spec = partition_spec(("kv_heads",), (language.num_kv_heads,), mesh, rules)
    return Cost(total + num_seqs * kv_bytes, per_device_max + seqs_per_device * kv_bytes / _num_shards(kv_spec, mesh))


def fraction_of_parameters(params: Any) -> float:
    """The fraction of all parameters that one device holds."""
    leaves = [leaf for _, leaf in _with_paths(params)]
    per_device = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return per_device / sum(math.prod(leaf.shape) for leaf in leaves)


def _products(config: SphinxConfig, params: Any, workload: Workload, count: int, batch_shards: int, mesh: Mesh) -> Cost:
    """Products with parameters, for `count` sequences or crops of which each device has 1 / `batch_shards`."""
    total = per_device_max = 0.0
    for path, leaf in _with_paths(params):
        flops = 2.0 * math.prod(leaf.shape) * count * _rows(config, path, workload)
        total += flops
        per_device_max += flops / (_model_shards(leaf, mesh) * batch_shards)
    return Cost(total, per_device_max)


def _rows(config: SphinxConfig, path: Path, workload: Workload) -> int | float:
    """The number of rows that the parameter at `path` multiplies, per sequence or per crop."""
    leaf = path[-1]
    if path[0] == "language":
        if path[1] == "head":
            return workload.num_logits
        if leaf in ("wqkv", "wo", "router"):
            return workload.length
        if leaf in ("w_in", "w_out"):
            return workload.length * config.language.experts_per_token / config.language.num_experts
        return 0
    return _vision_rows(config.vision, path)


def _vision_rows(vision: Any, path: Path) -> int:
    """Rows per crop. Vectors (biases, norms, scales, class tokens) and position embeddings multiply nothing."""
    leaf = path[-1]
    if leaf not in ("kernel", "qkv", "out", "q", "kv", "gate_up", "depthwise"):
        return 0
    if path[1] == "visual_proj":
        return vision.num_patch_tokens
    if path[1] == "qformer_proj":
        return vision.qformer.num_queries
    encoder = getattr(vision, str(path[1]))
    if path[1] == "convnext":
        stage = int(path[3]) if path[2] == "stages" else 0
        return (encoder.image_size // (4 * 2**stage)) ** 2
    patches = (encoder.image_size // encoder.patch) ** 2
    if "patches" in path:
        return patches
    if path[1] == "qformer" and path[2] == "groups":
        return patches + 1 if leaf == "kv" else encoder.num_queries
    return patches + 1


def _vision_flops(
    config: SphinxConfig, vision: VisionConfig, params: Any, mesh: Mesh, workload: Workload, rules: Rules
) -> Cost:
    num_crops = workload.num_images * vision.num_crops
    batch_shards = _batch_shards(num_crops, mesh, rules)
    cost = _products(config, {"vision": params}, workload, num_crops, batch_shards, mesh)
    for layers, queries, keys, width, heads in _vision_attention(vision):
        head_shards = _num_shards(partition_spec(("vision_heads",), (heads,), mesh, rules), mesh)
        cost += _sharded(4.0 * num_crops * layers * queries * keys * width, head_shards * batch_shards)
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


def _batch_shards(count: int, mesh: Mesh, rules: Rules) -> int:
    """The number of shards of a batch of `count`."""
    return _num_shards(partition_spec(("batch",), (count,), mesh, rules), mesh)


def _model_shards(leaf: Any, mesh: Mesh) -> int:
    """The number of parts of the products with a parameter; fsdp's shards are all-gathered before use."""
    return math.prod(mesh.shape[axis] for axis in _axes(leaf.sharding.spec) if axis not in ("data", "fsdp"))


def _axes(spec: PartitionSpec) -> list[str]:
    """The mesh axes of all dimensions."""
    return [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]


def _num_shards(spec: PartitionSpec, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(spec))


def _sharded(flops: float, num_shards: int) -> Cost:
    """The cost of work that `num_shards` devices divide evenly."""
    return Cost(flops, flops / num_shards)


def _with_paths(tree: Any) -> list[tuple[Path, Any]]:
    """(path, leaf) of all leaves, which are ShapeDtypeStructs or Quantized."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Quantized))
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]
