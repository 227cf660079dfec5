"""Attention over grouped queries: one function, its form chosen by platform, mask and sizes.

- `one query` reads keys and values where they lie: for decoding.
- `flash` keeps no scores (see `flash`): on Hopper GPUs, where each query sees the keys up to its own (`Causal`).
- `blocks` keeps none either (see `blockwise`), and is for everything else, but for scores that are few: those are made
  all at once.
"""

import importlib.metadata
import logging
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import sharding
from sharding import sharded_map
from sharding.log_once import log_once
from sphinx_jax.kernels import attention_flash
from sphinx_jax.kernels.attention_blockwise import attention_in_blocks
from sphinx_jax.kernels.attention_mask import Causal, Mask, written_out

log = logging.getLogger(__name__)

Form = Literal["one query", "flash", "blocks"]

_HEADS, _KEYS = ("batch", None, "kv_heads", "queries", "head_dim"), ("batch", None, "kv_heads", None)
_PAIRS = ("batch", None, None)

_SCORE_BYTES = {"cpu": (1 << 20, 1 << 20), "gpu": (1 << 27, 1 << 25)}
"""Of scores (float32) on one device: up to so many are made all at once, or else so many at a time. Timed on a CPU, but
on no GPU: there attention is to take little memory beside all else, in kernels that are worth starting."""

_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 512
"""Queries of a block, and keys. Of larger ones, more is computed that a causal mask leaves out."""


def attention(
    q: Float[Array, "batch q_len kv_heads group head_dim"],
    k: Float[Array, "batch kv_len kv_heads head_dim"],
    v: Float[Array, "batch kv_len kv_heads head_dim"],
    mask: Mask = None,
) -> Float[Array, "batch q_len kv_heads group head_dim"]:
    """softmax(q k' / sqrt(head_dim)) v, each key and value head serving `group` query heads.

    Scores and softmax are float32. Keys and values are never repeated: the group is a dimension of the query alone.
    """
    form = _form(q, k, mask)
    log_once(log, f"attention of {q.shape[1]} queries on {sharding.platform()}: {form}")
    if form == "flash" and mask.start is None:
        return sharded_map(_flash, (_HEADS, _KEYS, _KEYS), _HEADS, sum_over=())(q, k, v)
    if form == "flash":
        own = sharded_map(_flash_from, (_HEADS, _KEYS, _KEYS, ("batch",)), _HEADS, sum_over=())
        return own(q, k, v, mask.start)
    if form == "one query":
        own = sharded_map(_one_query, (_HEADS, _KEYS, _KEYS, _PAIRS), _HEADS, sum_over=())
        return own(q, k, v, written_out(mask, 1, k.shape[1]))
    names = ("batch",) if isinstance(mask, Causal) else _PAIRS
    return sharded_map(_blocks, (_HEADS, _KEYS, _KEYS, names), _HEADS, sum_over=())(q, k, v, mask)


def _form(q: Array, k: Array, mask: Mask) -> Form:
    if q.shape[1] == 1:
        return "one query"
    hopper = isinstance(mask, Causal) and sharding.compute_capability() == "9.0" and not _miscompiles_masks()
    fits = q.dtype == k.dtype and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] in attention_flash.HEAD_DIMS
    # The scores of fewer are small.
    return "flash" if hopper and fits and q.shape[1] >= attention_flash.TILE else "blocks"


def _miscompiles_masks() -> bool:
    """Whether the assembler for GPUs is one of which jax says that it gets causal attention wrong.

    From CUDA 12.8 up to before 12.9.1: `jax.experimental.pallas.ops.gpu.attention_mgpu` refuses to run there.
    """
    try:
        version = importlib.metadata.version("nvidia-cuda-nvcc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return False
    wrong = (12, 8) <= tuple(map(int, version.split("."))) < (12, 9, 86)
    if wrong:
        log_once(log, f"nvidia-cuda-nvcc-cu12 {version} gets masks wrong: 12.9.86 or newer makes attention faster")
    return wrong


def _flash(q, k, v):
    """One device's heads, the length filled up to whole tiles: what is past the end, no real query sees."""
    out = attention_flash.flash_attention(*map(_whole_tiles, (_side_by_side(q), k, v)))
    return out[:, : q.shape[1]].reshape(q.shape)


def _flash_from(q, k, v, start):
    """The same for queries from `start` on, whose keys and values begin at 0 and may go on past them."""
    # Slots past the end hold what a row said before: zero times what is not finite would be NaN.
    seen = jnp.arange(v.shape[1]) < (start + q.shape[1])[:, None]
    v = jnp.where(seen[:, :, None, None], v, 0)
    out = attention_flash.flash_attention_from(start, *map(_whole_tiles, (_side_by_side(q), k, v)))
    return out[:, : q.shape[1]].reshape(q.shape)


def _side_by_side(q):
    """All heads in one dimension, those of one key head together."""
    return q.reshape(*q.shape[:2], -1, q.shape[-1])


def _whole_tiles(x):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % attention_flash.TILE), (0, 0), (0, 0)))


def _blocks(q, k, v, mask):
    """One device's heads: their scores all at once if they are few, or else of some rows, and blocks, at a time."""
    batch, q_len, kv_heads, group, _ = q.shape
    at_once, at_a_time = _SCORE_BYTES["cpu" if sharding.platform() == "cpu" else "gpu"]
    row_bytes = lambda most: 4 * kv_heads * group * min(q_len, most) * min(k.shape[1], most)
    if batch * row_bytes(math.inf) <= at_once:
        return _all_at_once(q, k, v, mask)
    size = _LARGEST_BLOCK
    while row_bytes(size) > at_a_time and size > _SMALLEST_BLOCK:
        size //= 2
    fitting = max(1, at_a_time // row_bytes(size))
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fitting)
    if rows == batch:
        return attention_in_blocks(q, k, v, mask, size)
    # A mask may be the same for all rows.
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (q, k, v, _for_each_row(mask, batch)))
    return jax.lax.map(lambda part: attention_in_blocks(*part, size), parts).reshape(q.shape)


def _for_each_row(mask, batch):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), mask)


def _all_at_once(q, k, v, mask):
    scores_BKGQS = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32)
    scores_BKGQS = scores_BKGQS * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores_BKGQS = jnp.where(written_out(mask, q.shape[1], k.shape[1])[:, None, None], scores_BKGQS, -jnp.inf)
    weights_BKGQS = jax.nn.softmax(scores_BKGQS, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights_BKGQS, v)


def _one_query(q, k, v, mask):
    """The same for one query a row, on one device's heads, reading keys and values where they lie.

    With the heads as a dimension of the products, XLA transposes both for it, which of a cache means all of it for
    every word. So each query head is written out over the channels of all key heads, zero but in its own, and of its
    output over the channels of all value heads its own are kept: more arithmetic, in a time that reading takes anyway.
    """
    batch, _, kv_heads, group, head_dim = q.shape
    own = jnp.eye(kv_heads, dtype=q.dtype)[:, None, :, None]
    flat = lambda x: x.reshape(batch, -1, kv_heads * head_dim)
    wide_BHC = flat(q[:, 0, :, :, None] * own)
    scores_BHS = jnp.einsum("bhc,bsc->bhs", wide_BHC, flat(k), preferred_element_type=jnp.float32)
    scores_BHS = jnp.where(mask, scores_BHS * (head_dim**-0.5), -jnp.inf)
    weights_BHS = jax.nn.softmax(scores_BHS, axis=-1).astype(v.dtype)
    out_BHC = jnp.einsum("bhs,bsc->bhc", weights_BHS, flat(v))
    return jnp.sum(out_BHC.reshape(batch, kv_heads, group, kv_heads, head_dim) * own, axis=3)[:, None]
