"""Grouped-query attention: one function, its implementation chosen by platform, mask and sizes.

- `native`: one query per sequence on one CPU, in C++; what is filled of the KV cache is read (`native_attention`).
- `decode`: one query per sequence; keys and values of the KV cache are read in place.
- `flash`: Pallas kernels for Hopper GPUs and `Causal` masks; no scores in memory (`attention_flash`).
- `cudnn`: cuDNN's fused attention on Ampere, Ada and Blackwell GPUs, for `Causal` masks from position 0; no scores in
  memory either. For chunks that begin later, and for segments, cuDNN would read the mask as a matrix of scores.
- `dense`: all scores at once; where these are few.
- `blockwise`: plain XLA for every platform and mask; scores of one block in memory (`attention_blockwise`).
"""

import functools
import importlib.metadata
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import sharding
from sharding import sharded_map
from sharding.log_once import log_once
from sphinx_jax.kernels import attention_flash
from sphinx_jax.kernels.attention_blockwise import blockwise_attention
from sphinx_jax.kernels.attention_mask import Causal, Mask, dense_mask
from sphinx_jax.kernels.native_attention import attends_natively, native_decode_attention
from sphinx_jax.kernels.native_library import has_native_kernels

log = logging.getLogger(__name__)

Implementation = Literal["native", "decode", "flash", "cudnn", "dense", "blockwise"]

Queries = Float[Array, "batch q_len kv_heads group head_dim"]
Keys = Float[Array, "batch kv_len kv_heads head_dim"]

_QUERY_AXES, _KEY_AXES = ("batch", None, "kv_heads", "queries", "head_dim"), ("batch", None, "kv_heads", None)
_START_AXES, _MASK_AXES = ("batch",), ("batch", None, None)

_MAX_DENSE_SCORE_BYTES = {"cpu": 1 << 20, "gpu": 1 << 27}
"""Up to so many bytes of float32 scores on one device, attention is dense. Timed on CPUs. On GPUs not timed: set so
that attention is a small part of a program's memory."""

_MAX_BLOCK_SCORE_BYTES = {"cpu": 1 << 20, "gpu": 1 << 25}
"""Bytes of float32 scores on one device that blockwise attention computes in one step. Timed on CPUs. On GPUs not
timed: set so that a step is large enough to be worth its kernel launches."""

_CUDNN_CAPABILITIES = ("8", "10", "12")
"""Major compute capabilities of Ampere and Ada, and of Blackwell; Hopper has kernels of its own."""

_CUDNN_TILE, _CUDNN_MAX_HEAD_DIM = 64, 128
"""Lengths are padded to multiples of the tile: cuDNN refuses the gradient of odd ones."""

_MIN_BLOCK_SIZE, _MAX_BLOCK_SIZE = 64, 512
"""Queries, and keys, of a block. Larger blocks compute more scores that a causal mask discards."""


def attention(q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
    """softmax(q k' / sqrt(head_dim)) v, where each key/value head serves `group` query heads.

    Scores and softmax are float32. Keys and values are never repeated: the group is a dimension of the query alone.
    """
    if q.shape[1] == 1 and isinstance(mask, Causal) and mask.start is not None and attends_natively(q, k):
        _log_implementation(q, "native")
        return native_decode_attention(q[:, 0], k, v, mask.start + 1)[:, None]
    is_slice = isinstance(mask, Causal) and mask.kv_len is not None and mask.kv_len < k.shape[1]
    if isinstance(mask, Causal) and mask.kv_len is not None:
        k, v, mask = k[:, : mask.kv_len], v[:, : mask.kv_len], Causal(mask.start)
    if q.shape[1] == 1:
        _log_implementation(q, "decode")
        function = _decode_attention
        if is_slice and kv_slice_cost() == 1:
            function = _decode_attention_of_slice
        decode = sharded_map(function, (_QUERY_AXES, _KEY_AXES, _KEY_AXES, _MASK_AXES), _QUERY_AXES, ())
        return decode(q, k, v, dense_mask(mask, 1, k.shape[1]))
    if isinstance(mask, Causal) and _supports_flash(q, k):
        _log_implementation(q, "flash")
        if mask.start is None:
            return sharded_map(_local_flash, (_QUERY_AXES, _KEY_AXES, _KEY_AXES), _QUERY_AXES, ())(q, k, v)
        in_axes = (_QUERY_AXES, _KEY_AXES, _KEY_AXES, _START_AXES)
        return sharded_map(_local_flash_with_kv_cache, in_axes, _QUERY_AXES, ())(q, k, v, mask.start)
    if isinstance(mask, Causal) and mask.start is None and _supports_cudnn(q, k):
        _log_implementation(q, "cudnn")
        return sharded_map(_local_cudnn, (_QUERY_AXES, _KEY_AXES, _KEY_AXES), _QUERY_AXES, ())(q, k, v)
    mask_axes = _START_AXES if isinstance(mask, Causal) else _MASK_AXES
    in_axes = (_QUERY_AXES, _KEY_AXES, _KEY_AXES, mask_axes)
    return sharded_map(_local_dense_or_blockwise, in_axes, _QUERY_AXES, ())(q, k, v, mask)


def kv_slice_cost() -> int | None:
    """How many times decode steps pass over the part of a KV cache that they are to read (`Causal.kv_len`).

    GPUs read it in place. XLA:CPU copies it first: it is read, written and read again. None: no program for a part is
    needed, as one for all of the cache reads what is filled.
    """
    if sharding.platform() != "cpu":
        return 1
    return None if has_native_kernels() else 3


def _log_implementation(q: Queries, implementation: Implementation) -> None:
    log_once(log, f"attention of {q.shape[1]} queries on {sharding.platform()}: {implementation}")


def _supports_flash(q: Queries, k: Keys) -> bool:
    """Whether the target is a Hopper GPU and its kernels take these shapes and dtypes."""
    if sharding.compute_capability() != "9.0" or _has_ptxas_mask_bug():
        return False
    supported = q.dtype == k.dtype and q.dtype in (jnp.bfloat16, jnp.float16)
    # With fewer queries than a tile the scores are few, and most of the tile would be padding.
    return supported and q.shape[-1] in attention_flash.HEAD_DIMS and q.shape[1] >= attention_flash.TILE


def _has_ptxas_mask_bug() -> bool:
    """Whether the installed ptxas miscompiles causal masks: CUDA 12.8 up to, but not including, 12.9.1.

    `jax.experimental.pallas.ops.gpu.attention_mgpu` refuses to run with these versions.
    """
    try:
        version = importlib.metadata.version("nvidia-cuda-nvcc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return False
    affected = (12, 8) <= tuple(map(int, version.split("."))) < (12, 9, 86)
    if affected:
        log_once(
            log,
            f"no flash attention: nvidia-cuda-nvcc-cu12 {version} miscompiles causal masks; install 12.9.86 or newer",
        )
    return affected


def _local_flash(q: Queries, k: Keys, v: Keys) -> Queries:
    """Flash attention of one device's heads. Lengths are padded to whole tiles: no real query attends to padding."""
    out = attention_flash.flash_attention(*(_pad(x, attention_flash.TILE) for x in (_merge_heads(q), k, v)))
    return out[:, : q.shape[1]].reshape(q.shape)


def _local_flash_with_kv_cache(q: Queries, k: Keys, v: Keys, start: Int[Array, "batch"]) -> Queries:
    """The same for queries from position `start` on, with keys and values of a KV cache from position 0 on."""
    # Cache positions past the last query hold stale values of an earlier request. Their weights are zero, but zero
    # times infinity or NaN is NaN.
    visible = jnp.arange(v.shape[1]) < (start + q.shape[1])[:, None]
    v = jnp.where(visible[:, :, None, None], v, 0)
    padded = (_pad(x, attention_flash.TILE) for x in (_merge_heads(q), k, v))
    out = attention_flash.flash_attention_with_kv_cache(start, *padded)
    return out[:, : q.shape[1]].reshape(q.shape)


def _merge_heads(q: Queries) -> Float[Array, "batch q_len heads head_dim"]:
    """All query heads in one dimension, those of one key/value head adjacent."""
    return q.reshape(*q.shape[:2], -1, q.shape[-1])


def _pad(x: Float[Array, "batch length heads head_dim"], tile: int) -> Float[Array, "batch padded heads head_dim"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0)))


def _supports_cudnn(q: Queries, k: Keys) -> bool:
    """Whether the target is an Ampere, Ada or Blackwell GPU with cuDNN, which takes these shapes and dtypes."""
    if (sharding.compute_capability() or "").partition(".")[0] not in _CUDNN_CAPABILITIES:
        return False
    head_dim = q.shape[-1]
    supported = q.dtype == k.dtype and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[1] == k.shape[1]
    return supported and head_dim % 8 == 0 and head_dim <= _CUDNN_MAX_HEAD_DIM and _has_cudnn(sharding.platform())


@functools.cache
def _has_cudnn(platform: str) -> bool:
    """Whether jax finds the cuDNN library for `platform`; for an absent GPU `memory_plan.aot` answers for it."""
    x = jax.ShapeDtypeStruct((1, _CUDNN_TILE, 1, _CUDNN_MAX_HEAD_DIM), jnp.bfloat16)
    try:
        jax.eval_shape(_cudnn_attention, x, x, x)
    except RuntimeError as error:
        log_once(log, f"no cuDNN attention on {platform}: {error}; install nvidia-cudnn-cu12, as jax[cuda12] does")
        return False
    return True


def _local_cudnn(q: Queries, k: Keys, v: Keys) -> Queries:
    """cuDNN's attention of one device's heads. No real query attends to the padding, which follows it."""
    out = _cudnn_attention(*(_pad(x, _CUDNN_TILE) for x in (_merge_heads(q), k, v)))
    return out[:, : q.shape[1]].reshape(q.shape)


_cudnn_attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def _local_dense_or_blockwise(q: Queries, k: Keys, v: Keys, mask: Mask) -> Queries:
    """One device's heads: dense if their scores are few, else blockwise, some sequences of the batch at a time."""
    (batch, q_len, kv_heads, group, _), kv_len = q.shape, k.shape[1]
    platform = "cpu" if sharding.platform() == "cpu" else "gpu"
    if 4 * batch * kv_heads * group * q_len * kv_len <= _MAX_DENSE_SCORE_BYTES[platform]:
        _log_implementation(q, "dense")
        return _dense_attention(q, k, v, mask)
    _log_implementation(q, "blockwise")
    max_bytes = _MAX_BLOCK_SCORE_BYTES[platform]

    def score_bytes(block_size: int) -> int:
        """Of one sequence in one step."""
        return 4 * kv_heads * group * min(q_len, block_size) * min(kv_len, block_size)

    # The largest blocks of which one sequence fits, then as many sequences as fit and divide the batch.
    block_size = _MAX_BLOCK_SIZE
    while score_bytes(block_size) > max_bytes and block_size > _MIN_BLOCK_SIZE:
        block_size //= 2
    max_sequences = max(1, max_bytes // score_bytes(block_size))
    sequences = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= max_sequences)
    if sequences == batch:
        return blockwise_attention(q, k, v, mask, block_size)
    args = (q, k, v, _broadcast_mask(mask, batch))
    chunks = jax.tree.map(lambda x: x.reshape(-1, sequences, *x.shape[1:]), args)
    return jax.lax.map(lambda chunk: blockwise_attention(*chunk, block_size), chunks).reshape(q.shape)


def _broadcast_mask(mask: Mask, batch: int) -> Mask:
    """A mask that all sequences share, repeated for each of them."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), mask)


def _dense_attention(q: Queries, k: Keys, v: Keys, mask: Mask) -> Queries:
    scores_BKGQS = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
    scores_BKGQS = scores_BKGQS * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores_BKGQS = jnp.where(dense_mask(mask, q.shape[1], k.shape[1])[:, None, None], scores_BKGQS, -jnp.inf)
    weights_BKGQS = jax.nn.softmax(scores_BKGQS, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights_BKGQS, v)


def _decode_attention(q: Queries, k: Keys, v: Keys, mask: Bool[Array, "#batch 1 kv_len"]) -> Queries:
    """One query per sequence, on one device's heads, with keys and values read in place.

    With the heads as a batch dimension of the products, XLA transposes keys and values first: the whole KV cache, in
    every decode step. So heads and channels are one contracted dimension C = kv_heads x head_dim: each query head is
    zero in the channels of other key heads, and of its output only the channels of its own value head are taken. That
    is kv_heads times the arithmetic, in less time than reading the cache takes anyway.
    """
    batch, _, kv_heads, group, head_dim = q.shape
    own_head = jnp.eye(kv_heads, dtype=q.dtype)[:, None, :, None]

    def flatten_heads(x):
        return x.reshape(batch, -1, kv_heads * head_dim)

    q_BHC = flatten_heads(q[:, 0, :, :, None] * own_head)
    scores_BHS = jnp.einsum("bhc,bsc->bhs", q_BHC, flatten_heads(k), preferred_element_type=jnp.float32)
    scores_BHS = jnp.where(mask, scores_BHS * (head_dim**-0.5), -jnp.inf)
    weights_BHS = jax.nn.softmax(scores_BHS, axis=-1).astype(v.dtype)
    out_BHC = jnp.einsum("bhs,bsc->bhc", weights_BHS, flatten_heads(v))
    return jnp.sum(out_BHC.reshape(batch, kv_heads, group, kv_heads, head_dim) * own_head, axis=3)[:, None]


def _decode_attention_of_slice(q: Queries, k: Keys, v: Keys, mask: Bool[Array, "#batch 1 kv_len"]) -> Queries:
    """The same for keys and values that are a part of a longer KV cache, read in place on GPUs.

    cuBLAS takes no such part: XLA copies it before a product. A sum of products is compiled to a reduction, into which
    the slice is fused. Each key is multiplied by the queries of its own group only.
    """
    q_BKGD, scale = q[:, 0].astype(jnp.float32), q.shape[-1] ** -0.5
    scores_BSKG = jnp.sum(q_BKGD[:, None] * k[:, :, :, None].astype(jnp.float32), axis=-1) * scale
    weights_BSKG = jax.nn.softmax(jnp.where(mask[:, 0, :, None, None], scores_BSKG, -jnp.inf), axis=1)
    out_BKGD = jnp.sum(weights_BSKG[..., None] * v[:, :, :, None].astype(jnp.float32), axis=1)
    return out_BKGD.astype(v.dtype)[:, None]
