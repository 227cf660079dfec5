"""Attention in blocks of queries and keys, none of whose scores are kept, in plain XLA: for every platform.

For each block of queries a loop over blocks of keys, from the first that any of them sees to the last, keeps a running
maximum, sum and output of the softmax (https://arxiv.org/abs/2112.05682); the gradient computes the scores once more
(https://arxiv.org/abs/2307.08691, algorithm 2). Of long texts a causal mask leaves half of the blocks out.
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


_UNSEEN = -1e30
"""As a score: finite, so that the maximum over keys that are all unseen is, too."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_in_blocks(q: Queries, k: Keys, v: Keys, mask: Mask, size: int) -> Queries:
    """softmax(q k' / sqrt(head_dim)) v in blocks of up to `size` queries and keys.

    Scores, softmax and sums are float32. Has a gradient, but no forward-mode derivative.
    """
    return _forward(q, k, v, mask, size)[0]


def _forward(q: Queries, k: Keys, v: Keys, mask: Mask, size: int) -> tuple[Queries, tuple]:
    work = _Work(q, k, mask, size)
    q_blocks, k_blocks, v_blocks = work.queries(q), work.keys(k), work.keys(v)

    def step(i, j, carry):
        out, maximum, total = (_at(x, i) for x in carry)
        scores = jnp.where(work.sees(i, j), work.scores(_at(q_blocks, i), _at(k_blocks, j)), _UNSEEN)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        rescale, weights = jnp.exp(maximum - new_maximum), jnp.exp(scores - new_maximum[..., None])
        total = total * rescale + weights.sum(axis=-1)
        out = out * rescale[..., None]
        out += _product("bkgqs,bksd->bkgqd", weights.astype(v.dtype), _at(v_blocks, j))
        return tuple(_put(x, i, new) for x, new in zip(carry, (out, new_maximum, total), strict=True))

    rows = jnp.zeros(q_blocks.shape[:-1], jnp.float32)
    begin = (jnp.zeros(q_blocks.shape, jnp.float32), rows + _UNSEEN, rows)
    out, maximum, total = work.loop(step, pvary_like(begin, q, k, v))
    out = work.whole(out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, mask, out, maximum + jnp.log(total))


def _gradient(size: int, residuals: tuple, d_out: Queries) -> tuple[Queries, Keys, Keys, None]:
    q, k, v, mask, out, lse = residuals
    work = _Work(q, k, mask, size)
    q_blocks, k_blocks, v_blocks = work.queries(q), work.keys(k), work.keys(v)
    # What the softmax takes off each row of the scores' gradient.
    delta = work.queries(jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True))
    d_out = work.queries(d_out.astype(v.dtype))

    def step(i, j, carry):
        d_q, d_k, d_v = carry
        q, k, v, d = _at(q_blocks, i), _at(k_blocks, j), _at(v_blocks, j), _at(d_out, i)
        weights = jnp.exp(work.scores(q, k) - _at(lse, i)[..., None])
        weights = jnp.where(work.sees(i, j), weights, 0.0)
        d_weights = _product("bkgqd,bksd->bkgqs", d, v)
        d_scores = (weights * (d_weights - _at(delta, i)) * work.scale).astype(q.dtype)
        d_q = _put(d_q, i, _at(d_q, i) + _product("bkgqs,bksd->bkgqd", d_scores, k))
        d_k = _put(d_k, j, _at(d_k, j) + _product("bkgqs,bkgqd->bksd", d_scores, q))
        d_v = _put(d_v, j, _at(d_v, j) + _product("bkgqs,bkgqd->bksd", weights.astype(v.dtype), d))
        return d_q, d_k, d_v

    begin = tuple(jnp.zeros(blocks.shape, jnp.float32) for blocks in (q_blocks, k_blocks, v_blocks))
    gradients = work.loop(step, pvary_like(begin, q, k, v))
    return *(work.whole(d).astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None


attention_in_blocks.defvjp(_forward, _gradient)


class _Work:
    """How queries and keys are cut into blocks, and which of them see each other."""

    def __init__(self, q: Queries, k: Keys, mask: Mask, size: int):
        self.scale, self._mask = q.shape[-1] ** -0.5, mask
        self._q_len, self._kv_len = q.shape[1], k.shape[1]
        self._q_size, self._kv_size = _even(self._q_len, size), _even(self._kv_len, size)
        self._query_blocks, self._key_blocks = -(-self._q_len // self._q_size), -(-self._kv_len // self._kv_size)
        if not (mask is None or isinstance(mask, Causal)):
            rows = _cut(mask, 1, self._q_size)
            self._seen_pairs = jnp.moveaxis(_cut(rows, 3, self._kv_size), 1, 0)

    def queries(self, x: Queries) -> Float[Array, "blocks batch kv_heads group size head_dim"]:
        return jnp.moveaxis(_cut(x, 1, self._q_size), 2, 4)

    def keys(self, x: Keys) -> Float[Array, "blocks batch kv_heads size head_dim"]:
        return jnp.moveaxis(_cut(x, 1, self._kv_size), 2, 3)

    def whole(self, blocks: Array) -> Array:
        """Queries or keys again, of such blocks."""
        x = jnp.moveaxis(blocks, (0, -2), (1, 2))
        length = self._q_len if blocks.ndim == 6 else self._kv_len
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    def scores(self, q: Array, k: Array) -> Float[Array, "batch kv_heads group q_size kv_size"]:
        return _product("bkgqd,bksd->bkgqs", q, k) * self.scale

    def sees(self, i: Array, j: Array) -> Bool[Array, "rows #kv_heads #group #q_size kv_size"]:
        """Which query of block i sees which key of block j: none what only fills up the last block."""
        keys = j * self._kv_size + jnp.arange(self._kv_size)
        there = (keys < self._kv_len)[None, None, None, None]
        if self._mask is None:
            return there
        if isinstance(self._mask, Causal):
            start = jnp.zeros(1, jnp.int32) if self._mask.start is None else self._mask.start
            queries = start[:, None] + i * self._q_size + jnp.arange(self._q_size)
            return there & (keys <= queries[..., None])[:, None, None]
        return _at(_at(self._seen_pairs, i), j)[:, None, None]

    def loop(self, step: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
        """step(i, j, carry) for each pair of a block i of queries and a block j of keys in `pairs`."""
        i, j, number = self.pairs()
        i, j = jnp.asarray(i), jnp.asarray(j)
        return lax.fori_loop(0, number, lambda n, carry: step(_at(i, n), _at(j, n), carry), carry)

    def pairs(self) -> tuple[Array | np.ndarray, Array | np.ndarray, Array | int]:
        """Blocks of queries, the blocks of keys from the first to the last that each sees, and how many such pairs.

        Past that number the arrays say nothing. Where no start and no mask that is an array decides, the number is
        known when the program is compiled: a GPU then goes on by itself.
        """
        first, last = self._range_seen()
        ends = (last - first).cumsum()
        rounds = np.arange(self._query_blocks * self._key_blocks)
        i = (rounds[:, None] >= ends).sum(axis=1).clip(max=self._query_blocks - 1)
        number = ends[-1] if isinstance(ends, jax.Array) else int(ends[-1])
        return i, rounds - (ends - last)[i], number

    def _range_seen(self) -> tuple[Int[Array | np.ndarray, "query_blocks"], Int[Array | np.ndarray, "query_blocks"]]:
        """For each block of queries the first block of keys that any of it sees in any row, and the one past the last.

        The first is 0 unless the mask is an array.
        """
        past = np.minimum((np.arange(self._query_blocks) + 1) * self._q_size, self._q_len)
        nothing = np.zeros_like(past)
        if self._mask is None:
            return nothing, nothing + self._key_blocks
        if not isinstance(self._mask, Causal):
            seen, number = self._seen_pairs.any(axis=(2, 3, 4)), np.arange(self._key_blocks)
            first = jnp.where(seen, number, self._key_blocks).min(axis=1)
            # Of a block of which none sees any, if there is one, the range is empty.
            return first, jnp.where(seen, number + 1, first[:, None]).max(axis=1)
        if self._mask.start is None:
            return nothing, np.minimum(-(-past // self._kv_size), self._key_blocks)
        return nothing, jnp.minimum(-(-(jnp.max(self._mask.start) + past) // self._kv_size), self._key_blocks)


def _even(length: int, size: int) -> int:
    """Of equal blocks, as few as `size` allows: the length if it is one, else a multiple of 16 for the processor."""
    blocks = math.ceil(length / size)
    return length if blocks == 1 else -(-math.ceil(length / blocks) // 16) * 16


def _cut(x: Array, axis: int, size: int) -> Array:
    """Blocks of `size` along `axis`, the last filled up with zeros, as a first dimension."""
    fill = [(0, -x.shape[axis] % size if dim == axis else 0) for dim in range(x.ndim)]
    x = jnp.pad(x, fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _at(blocks: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(blocks, i, keepdims=False)


def _put(blocks: Array, i: Array, block: Array) -> Array:
    return lax.dynamic_update_index_in_dim(blocks, block, i, axis=0)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
