"""Attention in blocks of queries and keys, in plain XLA for every platform: the scores of one block are in memory.

For each block of queries a loop over blocks of keys, from the first to the last that any of the queries attends to,
updates a running maximum, sum and output of the softmax (https://arxiv.org/abs/2112.05682). The backward pass
recomputes the scores (https://arxiv.org/abs/2307.08691, algorithm 2). A causal mask skips half of the blocks of a long
sequence.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sharding import pvary_like
from sphinx_jax.kernels.attention_mask import Causal, Mask

Queries = Float[Array, "batch q_len kv_heads group head_dim"]
Keys = Float[Array, "batch kv_len kv_heads head_dim"]

# A sequence dimension of n positions, split into blocks: the block index comes first, so that a step reads one slice.
_QueryBlocks = Float[Array, "q_blocks batch kv_heads group q_size head_dim"]
_KeyBlocks = Float[Array, "kv_blocks batch kv_heads kv_size head_dim"]
_QueryBlock = Float[Array, "batch kv_heads group q_size head_dim"]
_KeyBlock = Float[Array, "batch kv_heads kv_size head_dim"]
_Residuals = tuple[Queries, Keys, Keys, Mask, Queries, Float[Array, "q_blocks batch kv_heads group q_size"]]

_MASKED_SCORE = -1e30
"""Finite, so that the running maximum is finite where a query has not attended to any key yet."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(q: Queries, k: Keys, v: Keys, mask: Mask, block_size: int) -> Queries:
    """softmax(q k' / sqrt(head_dim)) v in blocks of up to `block_size` queries and keys.

    Scores, softmax and accumulators are float32. Has a gradient, but no forward-mode derivative.
    """
    return _forward(q, k, v, mask, block_size)[0]


def _forward(q: Queries, k: Keys, v: Keys, mask: Mask, block_size: int) -> tuple[Queries, _Residuals]:
    """The attention, and what the backward pass needs: of the softmax only lse, log of each query's sum of exp."""
    blocking = _Blocking(q, k, mask, block_size)
    q_blocks, k_blocks, v_blocks = blocking.split_queries(q), blocking.split_keys(k), blocking.split_keys(v)

    def step(i, j, carry):
        # The carry holds all blocks of queries; a step updates block i in place. Invariant, per query, over the keys
        # of the blocks so far: maximum of the scores, total = sum of exp(score - maximum), out = that sum times v.
        out, maximum, total = (_block(x, i) for x in carry)
        visible, scores = blocking.visible(i, j), blocking.scores(_block(q_blocks, i), _block(k_blocks, j))
        scores = jnp.where(visible, scores, _MASKED_SCORE)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        # Where no key has been visible yet, all scores equal the maximum and the weights are 1: the first visible key
        # sets `rescale` to exp(-1e30 - score) = 0 and so discards them.
        rescale, weights = jnp.exp(maximum - new_maximum), jnp.exp(scores - new_maximum[..., None])
        total = total * rescale + weights.sum(axis=-1)
        out = out * rescale[..., None]
        out += _einsum_float32("bkgqs,bksd->bkgqd", weights.astype(v.dtype), _block(v_blocks, j))
        return tuple(_set_block(x, i, new) for x, new in zip(carry, (out, new_maximum, total), strict=True))

    # `pvary_like`: inside a sharded_map each device has its own accumulators.
    zeros = jnp.zeros(q_blocks.shape[:-1], jnp.float32)
    init = (jnp.zeros(q_blocks.shape, jnp.float32), zeros + _MASKED_SCORE, zeros)
    out, maximum, total = blocking.loop(step, pvary_like(init, q, k, v))
    # Each query attends to at least one key, so total is at least 1. Padding queries are dropped by merge_blocks.
    out = blocking.merge_blocks(out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, mask, out, maximum + jnp.log(total))


def _backward(block_size: int, residuals: _Residuals, d_out: Queries) -> tuple[Queries, Keys, Keys, None]:
    q, k, v, mask, out, lse = residuals
    blocking = _Blocking(q, k, mask, block_size)
    q_blocks, k_blocks, v_blocks = blocking.split_queries(q), blocking.split_keys(k), blocking.split_keys(v)
    # The gradient of the softmax subtracts from d_weights, per query, the sum over keys of weights times d_weights.
    # That is the dot product of the output and its gradient, which needs no scores.
    delta = blocking.split_queries(jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True))
    d_out_blocks = blocking.split_queries(d_out.astype(v.dtype))

    def step(i, j, carry):
        # The carry holds float32 sums over the pairs so far. With lse the weights are final at once: no rescaling.
        d_q, d_k, d_v = carry
        q, k, v, d_out = _block(q_blocks, i), _block(k_blocks, j), _block(v_blocks, j), _block(d_out_blocks, i)
        weights = jnp.exp(blocking.scores(q, k) - _block(lse, i)[..., None])
        weights = jnp.where(blocking.visible(i, j), weights, 0.0)
        d_weights = _einsum_float32("bkgqd,bksd->bkgqs", d_out, v)
        d_scores = (weights * (d_weights - _block(delta, i)) * blocking.scale).astype(q.dtype)
        d_q = _set_block(d_q, i, _block(d_q, i) + _einsum_float32("bkgqs,bksd->bkgqd", d_scores, k))
        # The sums over g add up the gradients of the query heads that share a key/value head.
        d_k = _set_block(d_k, j, _block(d_k, j) + _einsum_float32("bkgqs,bkgqd->bksd", d_scores, q))
        d_v = _set_block(d_v, j, _block(d_v, j) + _einsum_float32("bkgqs,bkgqd->bksd", weights.astype(v.dtype), d_out))
        return d_q, d_k, d_v

    init = tuple(jnp.zeros(blocks.shape, jnp.float32) for blocks in (q_blocks, k_blocks, v_blocks))
    d_q, d_k, d_v = map(blocking.merge_blocks, blocking.loop(step, pvary_like(init, q, k, v)))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


blockwise_attention.defvjp(_forward, _backward)


class _Blocking:
    """Splits queries and keys into blocks of equal size, and lists the pairs of blocks to compute."""

    def __init__(self, q: Queries, k: Keys, mask: Mask, block_size: int):
        self.scale, self._mask = q.shape[-1] ** -0.5, mask
        self._q_len, self._kv_len = q.shape[1], k.shape[1]
        self._q_size, self._kv_size = _equal_size(self._q_len, block_size), _equal_size(self._kv_len, block_size)
        self._num_q_blocks, self._num_kv_blocks = -(-self._q_len // self._q_size), -(-self._kv_len // self._kv_size)
        if not (mask is None or isinstance(mask, Causal)):
            # [q_blocks, kv_blocks, #batch, q_size, kv_size]; padding is False.
            by_queries = _split(mask, 1, self._q_size)
            self._mask_blocks = jnp.moveaxis(_split(by_queries, 3, self._kv_size), 1, 0)

    def split_queries(self, x: Float[Array, "batch q_len kv_heads group width"]) -> _QueryBlocks:
        # Heads before positions: the products of a step are batched over batch and kv_heads, without a transpose.
        return jnp.moveaxis(_split(x, 1, self._q_size), 2, 4)

    def split_keys(self, x: Keys) -> _KeyBlocks:
        return jnp.moveaxis(_split(x, 1, self._kv_size), 2, 3)

    def merge_blocks(self, blocks: _QueryBlocks | _KeyBlocks) -> Queries | Keys:
        """The inverse of `split_queries` or `split_keys`, without the padding."""
        # Block and position in the block are adjacent then, and merge into one dimension.
        x = jnp.moveaxis(blocks, (0, -2), (1, 2))
        length = self._q_len if blocks.ndim == 6 else self._kv_len
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    def scores(self, q: _QueryBlock, k: _KeyBlock) -> Float[Array, "batch kv_heads group q_size kv_size"]:
        return _einsum_float32("bkgqd,bksd->bkgqs", q, k) * self.scale

    def visible(self, i: Int[Array, ""], j: Int[Array, ""]) -> Bool[Array, "#batch 1 1 #q_size kv_size"]:
        """Which queries of block i attend to which keys of block j. Padding keys are visible to no query."""
        keys = j * self._kv_size + jnp.arange(self._kv_size)
        not_padding = (keys < self._kv_len)[None, None, None, None]
        if self._mask is None:
            return not_padding
        if isinstance(self._mask, Causal):
            start = jnp.zeros(1, jnp.int32) if self._mask.start is None else self._mask.start
            queries = start[:, None] + i * self._q_size + jnp.arange(self._q_size)
            return not_padding & (keys <= queries[..., None])[:, None, None]
        return _block(_block(self._mask_blocks, i), j)[:, None, None]

    def loop(self, step: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
        """step(i, j, carry) for each pair of a query block i and a key block j in `block_pairs`, as one loop."""
        i, j, num_pairs = self.block_pairs()
        i, j = jnp.asarray(i), jnp.asarray(j)
        return lax.fori_loop(0, num_pairs, lambda n, carry: step(_block(i, n), _block(j, n), carry), carry)

    def block_pairs(
        self,
    ) -> tuple[Int[Array | np.ndarray, "pairs"], Int[Array | np.ndarray, "pairs"], Int[Array, ""] | int]:
        """Pairs of a query block and each key block in its visible range, and how many pairs there are.

        Entries past that number are undefined. The number is a Python int if it depends neither on a start position
        nor on a boolean mask: then the trip count is in the program, and a GPU needs no round trip to the host.
        """
        first, last = self._visible_range()
        # Pair n belongs to the first query block whose cumulative count exceeds n.
        ends = (last - first).cumsum()
        pairs = np.arange(self._num_q_blocks * self._num_kv_blocks)
        i = (pairs[:, None] >= ends).sum(axis=1).clip(max=self._num_q_blocks - 1)
        num_pairs = ends[-1] if isinstance(ends, jax.Array) else int(ends[-1])
        # The pairs of block i end at ends[i] with key block last[i] - 1, which gives the key block of pair n.
        return i, pairs - (ends - last)[i], num_pairs

    def _visible_range(self) -> tuple[Int[Array | np.ndarray, "q_blocks"], Int[Array | np.ndarray, "q_blocks"]]:
        """Per query block the first visible key block, and the one after the last, over all sequences of the batch.

        The first is 0 unless the mask is an array.
        """
        q_end = np.minimum((np.arange(self._num_q_blocks) + 1) * self._q_size, self._q_len)
        zeros = np.zeros_like(q_end)
        if self._mask is None:
            return zeros, zeros + self._num_kv_blocks
        if not isinstance(self._mask, Causal):
            visible, index = self._mask_blocks.any(axis=(2, 3, 4)), np.arange(self._num_kv_blocks)
            first = jnp.where(visible, index, self._num_kv_blocks).min(axis=1)
            # A query block that attends to no key has an empty range.
            return first, jnp.where(visible, index + 1, first[:, None]).max(axis=1)
        if self._mask.start is None:
            return zeros, np.minimum(-(-q_end // self._kv_size), self._num_kv_blocks)
        # The latest sequence decides for the batch; `visible` masks the keys past the end of the others.
        return zeros, jnp.minimum(-(-(jnp.max(self._mask.start) + q_end) // self._kv_size), self._num_kv_blocks)


def _equal_size(length: int, max_size: int) -> int:
    """Size of the fewest equal blocks of at most `max_size`: `length` for a single block, else a multiple of 16.

    A multiple of 16 fills vector registers and tensor core tiles; equal sizes leave little padding in the last block.
    """
    blocks = math.ceil(length / max_size)
    return length if blocks == 1 else -(-math.ceil(length / blocks) // 16) * 16


def _split(x: Array, axis: int, size: int) -> Array:
    """Blocks of `size` along `axis`, the last padded with zeros; the block index is a new first dimension."""
    padding = [(0, -x.shape[axis] % size if dim == axis else 0) for dim in range(x.ndim)]
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _block(blocks: Array, i: Int[Array, ""]) -> Array:
    return lax.dynamic_index_in_dim(blocks, i, keepdims=False)


def _set_block(blocks: Array, i: Int[Array, ""], block: Array) -> Array:
    return lax.dynamic_update_index_in_dim(blocks, block, i, axis=0)


def _einsum_float32(subscripts: str, a: Array, b: Array) -> Array:
    """A product of two arrays, accumulated and returned in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
