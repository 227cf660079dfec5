"""Causal flash attention for Hopper GPUs in Pallas: no scores in memory (https://arxiv.org/abs/2307.08691, 2407.08608).

A thread block computes one tile of 128 positions of one head: queries, or keys for the gradients of keys and values. It
has three warpgroups. One issues the copies of the blocks that the tile attends to into shared memory (two stages, so
that a copy overlaps with the products of the block before). Two compute, 64 positions of the tile each:

- forward: running maximum, sum and output of the softmax, over blocks of keys;
- gradient of queries: scores recomputed, d_q accumulated over blocks of keys;
- gradients of keys and values: scores recomputed, d_k and d_v accumulated over blocks of queries.

Each kernel sums over its loop in registers and writes its tile once: no atomics, and the same result in every run.

When this file goes: on the day that `python benchmarks/gpu.py --first` shows on a Hopper GPU that cuDNN's attention is
at most 5 % slower than these kernels forward and with its gradient, at 355, 1,519 and 4,096 positions, and blockwise
attention takes at most 5 % of the time of a chunked prefill (cuDNN has no mask for chunks that begin past position 0).
On 2026-11-26 cuDNN took 1.31 of the time at 2,048 positions and 0.97 at 8,192, forward.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from sharding import pvary_like

TILE = 128
"""Positions of a thread block, and keys of a block in its loop, for 16-bit numbers and head_dim 128.

Shared memory of the gradient of queries: 32 KiB each for its tiles of q and d_out, and two stages of 32 KiB each for k
and v, 192 of 227 KiB. Registers of the forward pass, per thread: 64 for out, 64 for the scores and 32 for the weights,
of about 230. A larger tile fits into neither.
"""

HEAD_DIMS = (64, 128)

_WARPGROUPS = 2
"""That compute; one more copies."""

_ROWS = TILE // _WARPGROUPS
"""Positions of a compute warpgroup: 64, the rows of one wgmma instruction."""

_Accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]  # public, though not re-exported explicitly

_LOG2E = math.log2(math.e)
"""Scores are scaled by it, as the GPU has an instruction for exp2 but none for exp."""

_SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""The layout of 16-bit matrices in shared memory that wgmma reads without bank conflicts."""

_MATRIX, _ROW, _COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Register layouts: a wgmma accumulator; one value per row of it; one value per column of it."""

Queries = Float[Array, "batch length heads head_dim"]
Keys = Float[Array, "batch length kv_heads head_dim"]
CachedKeys = Float[Array, "batch cache_len kv_heads head_dim"]
RowStats = Float[Array, "batch heads length"]
"""One float32 per query and head."""

_Residuals = tuple[Queries, Keys, Keys, Queries, RowStats]


@jax.custom_vjp
def flash_attention(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k' / sqrt(head_dim)) v where query i attends to keys 0 to i.

    bfloat16 or float16; `length` a multiple of TILE, `head_dim` one of HEAD_DIMS, `heads` a multiple of `kv_heads`.
    """
    return _forward(_flash_forward_kernel, q, k, v)[0]


def flash_attention_with_kv_cache(start: Int[Array, "batch"], q: Queries, k: CachedKeys, v: CachedKeys) -> Queries:
    """The same where query i of a sequence attends to keys 0 to start + i: chunked prefill with a KV cache.

    `cache_len` too is a multiple of TILE. Values that no query attends to are multiplied by zero, and must be finite.
    Has no gradient.
    """
    return _forward(_flash_forward_cache_kernel, q, k, v, start)[0]


# The kernels are called from jitted functions, so that each is lowered once for all layers: half a second per call.
@functools.partial(jax.jit, static_argnums=0)
def _forward(kernel, q: Queries, *others: Array) -> tuple[Queries, RowStats]:
    """The attention, and lse: log2 of each query's sum of exponentials."""
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    scratch = (_tile_smem(q), _row_smem(), plgpu.Barrier(num_barriers=_WARPGROUPS))
    return _launch(kernel, (jax.ShapeDtypeStruct(q.shape, q.dtype), lse), scratch, q, *others)


def _vjp_forward(q: Queries, k: Keys, v: Keys) -> tuple[Queries, _Residuals]:
    # Without the barrier XLA clones the kernel: one call for the output, one for the residuals.
    out, lse = lax.optimization_barrier(_forward(_flash_forward_kernel, q, k, v))
    return out, (q, k, v, out, lse)


@jax.jit
def _vjp_backward(residuals: _Residuals, d_out: Queries) -> tuple[Queries, Keys, Keys]:
    q, k, v, out, lse = residuals
    d_out = d_out.astype(q.dtype)
    # The gradient of the softmax subtracts from d_weights, per query, the sum over keys of weights times d_weights.
    # That is the dot product of the output and its gradient, which needs no scores.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    barrier = plgpu.Barrier(num_arrivals=4, num_barriers=_WARPGROUPS)
    scratch = (_tile_smem(q), _tile_smem(q), _row_smem(), _row_smem(), barrier)
    d_q = _launch(_flash_dq_kernel, jax.ShapeDtypeStruct(q.shape, q.dtype), scratch, q, k, v, d_out, lse, delta)
    barrier = plgpu.Barrier(num_arrivals=2, num_barriers=_WARPGROUPS)
    per_query_head = jax.ShapeDtypeStruct(q.shape, k.dtype)
    out_type, scratch = (per_query_head, per_query_head), (_tile_smem(k), _tile_smem(v), barrier)
    d_k, d_v = _launch(_flash_dkv_kernel, out_type, scratch, q, k, v, d_out, lse, delta)

    def sum_group(d):
        """Over the query heads of each key head."""
        return d.reshape(*k.shape[:3], -1, k.shape[3]).sum(axis=3, dtype=jnp.float32).astype(k.dtype)

    return d_q, sum_group(d_k), sum_group(d_v)


flash_attention.defvjp(_vjp_forward, _vjp_backward)


def _launch(kernel, out_type, scratch, q: Queries, k: Array, *others: Array):
    """`kernel` on a grid of tiles, sequences and query heads.

    The last dimension varies fastest: query heads of one key head run at the same time and share its keys and values in
    the second-level cache.
    """
    batch, length, heads, _ = q.shape
    group = heads // k.shape[2]
    run = plgpu.kernel(
        functools.update_wrapper(functools.partial(kernel, group), kernel),
        out_type=out_type,
        grid=(length // TILE, batch, heads),
        grid_names=("tile", "batch", "head"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return jax.tree.map(lambda out: pvary_like(out, q), run(q, k, *others))


def _flash_forward_cache_kernel(group, q_ref, k_ref, v_ref, start_ref, *others):
    start = start_ref[lax.axis_index("batch")]
    _flash_forward_kernel(group, q_ref, k_ref, v_ref, *others, start=start)


def _flash_forward_kernel(group, q_ref, k_ref, v_ref, out_ref, lse_ref, q_smem, lse_smem, barrier, start=0):
    """One tile of queries; `group` query heads share a key head. The first query is at position `start`.

    `*_ref` are whole arrays in global memory, `*_smem` hold one part per compute warpgroup.
    """
    batch, head, tile, warpgroup, rows = _program_ids(last_tile_first=True, length=q_ref.shape[1])
    head_dim = q_ref.shape[3]
    q, lse = q_smem.at[warpgroup], lse_smem.at[warpgroup]
    scale = head_dim**-0.5 * _LOG2E

    def compute(pipeline):
        # Each warpgroup copies and awaits its own 64 queries, then runs the loop over blocks of keys. The carry is in
        # registers: out [64, head_dim], maximum [64] and total [64], all float32.
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q, barrier.at[warpgroup])
        plgpu.barrier_wait(barrier.at[warpgroup])
        out, maximum, total = pipeline((_zeros(head_dim), _full_row(-jnp.inf), _full_row(0.0)))
        # Only this warpgroup reads its part of q_smem, and its last product is complete: reuse it for the output.
        q[...] = (out / _broadcast_rows(total, out.shape)).astype(q.dtype)
        lse[...] = maximum + jnp.log(total) * _LOG2E
        # Writes to shared memory must be visible to the asynchronous copies before these start.
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    def step(index, k, v, k_done, v_done, carry):
        # k and v: [TILE, head_dim] in shared memory. Invariant, per query, over the keys so far: maximum of the scaled
        # scores, total = sum of exp2(score - maximum), out = that sum times v.
        out, maximum, total = carry
        scores = _wgmma(q, k.transpose((1, 0)))
        # k is free for the next block while the softmax of this one is computed.
        plgpu.barrier_arrive(k_done)
        scores = jnp.where(_causal_mask(start + rows.start, index[0] * TILE, scores.shape), scores * scale, -jnp.inf)
        # Every query attends to key 0, which is in the first block: from there on the maximum is finite, and
        # exp2(-inf - maximum) is zero.
        new_maximum = jnp.maximum(maximum, scores.max(axis=1))
        rescale = jnp.exp2(maximum - new_maximum)
        weights = jnp.exp2(scores - _broadcast_rows(new_maximum, scores.shape))
        total = total * rescale + weights.sum(axis=1)
        # The weights are 16-bit numbers for the tensor cores, straight from registers.
        out = _wgmma(weights.astype(v.dtype), v, out * _broadcast_rows(rescale, out.shape))
        plgpu.barrier_arrive(v_done)
        return out, new_maximum, total

    kv_head = lax.div(head, jnp.asarray(group, head.dtype))
    keys = plgpu.BlockSpec((TILE, head_dim), lambda block: (block, 0), transforms=_SWIZZLE)
    # Blocks of keys up to the one with the position of the tile's last query, of those that exist: padding queries may
    # be at positions past the end of the cache.
    blocks = lax.min(tile + 1 + pl.cdiv(start, TILE), k_ref.shape[1] // TILE)
    _pipeline(step, blocks, [keys, keys], compute)(k_ref.at[batch, :, kv_head], v_ref.at[batch, :, kv_head])


def _flash_dq_kernel(
    group, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_q_ref,
    q_smem, d_out_smem, lse_smem, delta_smem, barrier,
):  # fmt: skip
    """Gradient of one tile of queries: d_q = scale * sum over keys of weights * (d_out v' - delta) k."""
    batch, head, tile, warpgroup, rows = _program_ids(last_tile_first=True, length=q_ref.shape[1])
    head_dim = q_ref.shape[3]
    # A warpgroup's own parts: q and d_out [64, head_dim], lse and delta [64].
    q, d_out, lse, delta = (smem.at[warpgroup] for smem in (q_smem, d_out_smem, lse_smem, delta_smem))

    def compute(pipeline):
        # All four copies arrive at one barrier (`num_arrivals=4`).
        for ref, smem in ((q_ref, q), (d_out_ref, d_out)):
            plgpu.copy_gmem_to_smem(ref.at[batch, rows, head], smem, barrier.at[warpgroup])
        for ref, smem in ((lse_ref, lse), (delta_ref, delta)):
            plgpu.copy_gmem_to_smem(ref.at[batch, head, rows], smem, barrier.at[warpgroup])
        plgpu.barrier_wait(barrier.at[warpgroup])
        # lse and delta are constants of the loop; in the carry they stay in registers.
        d_q, *_ = pipeline((_zeros(head_dim), _load(lse, _ROW), _load(delta, _ROW)))
        # The scale of the scores, once for the sum. Only this warpgroup reads its part of q_smem: reuse it.
        q[...] = (d_q * head_dim**-0.5).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, d_q_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def step(index, k, v, k_done, v_done, carry):
        d_q, lse, delta = carry
        scores = _wgmma(q, k.transpose((1, 0)))
        # With lse the weights are normalised at once: no running maximum, no rescaling.
        weights = jnp.exp2(scores * (head_dim**-0.5 * _LOG2E) - _broadcast_rows(lse, scores.shape))
        weights = jnp.where(_causal_mask(rows.start, index[0] * TILE, scores.shape), weights, 0.0)
        # Three products per block, against two forward. k is read by the first and the last, v by the second only.
        d_weights = _wgmma(d_out, v.transpose((1, 0)))
        plgpu.barrier_arrive(v_done)
        d_scores = weights * (d_weights - _broadcast_rows(delta, scores.shape))
        d_q = _wgmma(d_scores.astype(k.dtype), k, d_q)
        plgpu.barrier_arrive(k_done)
        return d_q, lse, delta

    kv_head = lax.div(head, jnp.asarray(group, head.dtype))
    keys = plgpu.BlockSpec((TILE, head_dim), lambda block: (block, 0), transforms=_SWIZZLE)
    _pipeline(step, tile + 1, [keys, keys], compute)(k_ref.at[batch, :, kv_head], v_ref.at[batch, :, kv_head])


def _flash_dkv_kernel(
    group, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_k_ref, d_v_ref, k_smem, v_smem, barrier
):  # fmt: skip
    """Gradients of one tile of keys and values, for one query head; the caller sums over the heads of a group."""
    batch, head, tile, warpgroup, rows = _program_ids()
    kv_head = lax.div(head, jnp.asarray(group, head.dtype))
    head_dim = q_ref.shape[3]
    k, v = k_smem.at[warpgroup], v_smem.at[warpgroup]
    # Blocks of 64 queries. Registers per thread: 64 each for d_k and d_v, and 32 each for two products [64 keys, 64
    # queries], 192 of about 230; with 128 queries it would be 256.
    # The loop runs from the last block to the one on the diagonal: so its first block is the same for all tiles.
    blocks = q_ref.shape[1] // _ROWS

    def block_of(i):
        return blocks - 1 - i

    def compute(pipeline):
        for ref, smem in ((k_ref, k), (v_ref, v)):
            plgpu.copy_gmem_to_smem(ref.at[batch, rows, kv_head], smem, barrier.at[warpgroup])
        plgpu.barrier_wait(barrier.at[warpgroup])
        d_k, d_v = pipeline((_zeros(head_dim), _zeros(head_dim)))
        k[...] = (d_k * head_dim**-0.5).astype(k.dtype)
        v[...] = d_v.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, d_k_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(v, d_v_ref.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    def step(index, q, d_out, lse, delta, q_done, d_out_done, lse_done, delta_done, carry):
        d_k, d_v = carry
        # [keys, queries]: weights and d_scores are left sides of the products for d_v and d_k as they are, and a left
        # side in registers cannot be transposed. lse and delta are per column, then.
        scores = _wgmma(k, q.transpose((1, 0)))
        lse = lax.broadcast_in_dim(_load(lse, _COLUMN), scores.shape, [1])
        plgpu.barrier_arrive(lse_done)
        weights = jnp.exp2(scores * (head_dim**-0.5 * _LOG2E) - lse)
        # The last blocks of the loop hold queries before some of the tile's keys.
        mask = _causal_mask(block_of(index[0]) * _ROWS, rows.start, scores.shape, query_dim=1)
        weights = jnp.where(mask, weights, 0.0)
        d_v = _wgmma(weights.astype(d_out.dtype), d_out, d_v)
        d_weights = _wgmma(v, d_out.transpose((1, 0)))
        plgpu.barrier_arrive(d_out_done)
        delta = lax.broadcast_in_dim(_load(delta, _COLUMN), scores.shape, [1])
        plgpu.barrier_arrive(delta_done)
        d_k = _wgmma((weights * (d_weights - delta)).astype(q.dtype), q, d_k)
        plgpu.barrier_arrive(q_done)
        return d_k, d_v

    queries = plgpu.BlockSpec((_ROWS, head_dim), lambda i: (block_of(i), 0), transforms=_SWIZZLE)
    stats = plgpu.BlockSpec((_ROWS,), lambda i: (block_of(i),))
    # Queries before the tile attend to none of its keys.
    steps = blocks - tile * _WARPGROUPS
    inputs = (
        q_ref.at[batch, :, head],
        d_out_ref.at[batch, :, head],
        lse_ref.at[batch, head],
        delta_ref.at[batch, head],
    )
    _pipeline(step, steps, [queries, queries, stats, stats], compute)(*inputs)


def _program_ids(last_tile_first: bool = False, length: int = 0):
    """Sequence, head, tile and warpgroup of this thread, and the positions of the warpgroup within the sequence.

    `last_tile_first` reverses the tiles of `length` positions. The last tile of queries attends to most keys; if the
    longest tiles start first, short ones fill the multiprocessors at the end.
    """
    batch, head, tile, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "tile", "warpgroup"))
    if last_tile_first:
        tile = length // TILE - 1 - tile
    return batch, head, tile, warpgroup, pl.ds(tile * TILE + warpgroup * _ROWS, _ROWS)


def _pipeline(step, steps, in_specs, compute):
    """A loop of `steps` over blocks in global memory, for `compute` to call with its initial carry.

    The copying warpgroup fills a stage as soon as both others have arrived at its barriers; `step` arrives by hand,
    input by input, after the last product that reads it. It gives up registers (40 remain) for those that compute.
    """
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=in_specs,
        max_concurrent_steps=2,
        wg_axis="warpgroup",
        num_compute_wgs=_WARPGROUPS,
        manual_consumed_barriers=True,
        compute_context=compute,
    )


def _tile_smem(x: Array):
    """Shared memory for a tile of x, [_ROWS, head_dim] per compute warpgroup."""
    return plgpu.SMEM((_WARPGROUPS, _ROWS, x.shape[-1]), x.dtype, transforms=_SWIZZLE)


def _row_smem():
    """Shared memory for one float32 per position of a tile."""
    return plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32)


def _zeros(head_dim: int):
    return plgpu.layout_cast(jnp.zeros((_ROWS, head_dim), jnp.float32), _MATRIX)


def _full_row(value: float):
    return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), _ROW)


def _wgmma(a, b, accumulator=None) -> Any:
    """a b (+ accumulator) on the tensor cores, in float32, complete on return.

    `a` is in shared memory or registers, `b` in shared memory; the result is in registers, of layout _MATRIX.
    """
    if accumulator is not None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(_Accumulator.init(accumulator))

    def scope(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(scope, _Accumulator((a.shape[0], b.shape[1]), jnp.float32))


def _load(ref, layout):
    # jax 0.10 requires an index, jax 0.12 accepts none.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout)


def _broadcast_rows(row, shape):
    return lax.broadcast_in_dim(row, shape, [0])


def _causal_mask(first_query, first_key, shape, query_dim=0):
    """True where a query attends to a key; `query_dim` is the dimension of `shape` that counts queries."""

    def positions(dim):
        return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=_MATRIX)

    return positions(query_dim) + first_query >= positions(1 - query_dim) + first_key
