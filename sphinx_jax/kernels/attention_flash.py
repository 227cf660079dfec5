"""Causal attention for Hopper GPUs that keeps no scores, in Pallas (https://arxiv.org/abs/2307.08691, 2407.08608).

Each thread block has a tile of one head, of queries or for the second half of the gradient of keys. One warpgroup
copies what the tile looks at into shared memory, block by block; two others, with half of the tile each, compute: the
forward pass a running maximum, sum and output of the softmax, the gradient the same scores once more.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from sharding import pvary_like

TILE = 128
"""Positions of a thread block: more do not fit into its registers and shared memory."""

HEAD_DIMS = (64, 128)

_WARPGROUPS = 2
_HALF = TILE // _WARPGROUPS

_LOG2E = math.log2(math.e)

_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""How the tensor cores want 16-bit numbers in shared memory."""

_MATRIX, _ROW, _COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Where a warpgroup's threads keep a product of the tensor cores, one value for each of its rows, for each column."""

Queries = Float[Array, "batch length heads head_dim"]
Keys = Float[Array, "batch length kv_heads head_dim"]
Rows = Float[Array, "batch heads length"]
Cached = Float[Array, "batch slots kv_heads head_dim"]


@jax.custom_vjp
def flash_attention(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k' / sqrt(head_dim)) v where query i sees keys 0 to i.

    bfloat16 or float16; `length` a multiple of TILE, `head_dim` one of HEAD_DIMS, `heads` of `kv_heads`.
    """
    return _forward(_forward_tile, q, k, v)[0]


def flash_attention_from(start: Int[Array, "batch"], q: Queries, k: Cached, v: Cached) -> Queries:
    """The same where query i of a row sees keys 0 to start + i: for a text whose beginning is in a cache.

    `slots` too is a multiple of TILE. Values that no query sees are multiplied by zero, and have to be finite. Has no
    gradient.
    """
    return _forward(_later_forward_tile, q, k, v, start)[0]


# Compiled functions of their own, so that a kernel is lowered once for all layers: half a second each time.
@functools.partial(jax.jit, static_argnums=0)
def _forward(tile, q: Queries, *others) -> tuple[Queries, Rows]:
    """The attention, and log2 of each query's sum of exponentials."""
    rows = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    scratch = (_halves(q), _half_rows(), plgpu.Barrier(num_barriers=_WARPGROUPS))
    return _kernel(tile, (jax.ShapeDtypeStruct(q.shape, q.dtype), rows), scratch, q, *others)


def _with_residuals(q: Queries, k: Keys, v: Keys) -> tuple[Queries, tuple]:
    # Kept apart from where they are stored: XLA would run the kernel once for each of both.
    out, lse = lax.optimization_barrier(_forward(_forward_tile, q, k, v))
    return out, (q, k, v, out, lse)


@jax.jit
def _gradient(residuals: tuple, d_out: Queries) -> tuple[Queries, Keys, Keys]:
    q, k, v, out, lse = residuals
    d_out = d_out.astype(q.dtype)
    # What the softmax takes off each row of the scores' gradient.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    own = (_halves(q), _halves(q), _half_rows(), _half_rows(), plgpu.Barrier(num_arrivals=4, num_barriers=_WARPGROUPS))
    d_q = _kernel(_d_query_tile, jax.ShapeDtypeStruct(q.shape, q.dtype), own, q, k, v, d_out, lse, delta)
    own = (_halves(k), _halves(v), plgpu.Barrier(num_arrivals=2, num_barriers=_WARPGROUPS))
    by_head = jax.ShapeDtypeStruct(q.shape, k.dtype)
    d_k, d_v = _kernel(_d_key_tile, (by_head, by_head), own, q, k, v, d_out, lse, delta)
    # Of each key head, over the queries' heads that it serves.
    total = lambda d: d.reshape(*k.shape[:3], -1, k.shape[3]).sum(axis=3, dtype=jnp.float32).astype(k.dtype)
    return d_q, total(d_k), total(d_v)


flash_attention.defvjp(_with_residuals, _gradient)


def _kernel(tile, out_type, scratch, q: Queries, k: Keys, *others):
    """`tile` run for each tile of each row and head, heads of one key head side by side."""
    batch, length, heads, _ = q.shape
    run = plgpu.kernel(
        functools.update_wrapper(functools.partial(tile, heads // k.shape[2]), tile),
        out_type=out_type,
        grid=(length // TILE, batch, heads),
        grid_names=("tile", "batch", "head"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return jax.tree.map(lambda out: pvary_like(out, q), run(q, k, *others))


def _later_forward_tile(group, q_ref, k_ref, v_ref, start_ref, *others):
    start = start_ref[lax.axis_index("batch")]
    _forward_tile(group, q_ref, k_ref, v_ref, *others, start=start)


def _forward_tile(group, q_ref, k_ref, v_ref, out_ref, lse_ref, own_q, own_lse, arrived, start=0):
    batch, head, tile, warpgroup, mine = _place(last_first=q_ref.shape[1])
    head_dim = q_ref.shape[3]
    q, lse = own_q.at[warpgroup], own_lse.at[warpgroup]
    scale = head_dim**-0.5 * _LOG2E

    def compute(pipeline):
        plgpu.copy_gmem_to_smem(q_ref.at[batch, mine, head], q, arrived.at[warpgroup])
        plgpu.barrier_wait(arrived.at[warpgroup])
        row = lambda value: plgpu.layout_cast(jnp.full((_HALF,), value, jnp.float32), _ROW)
        out, maximum, total = pipeline((_zeros(head_dim), row(-jnp.inf), row(0.0)))
        q[...] = (out / _along_rows(total, out.shape)).astype(q.dtype)
        lse[...] = maximum + jnp.log(total) * _LOG2E
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_ref.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    def step(index, k, v, k_done, v_done, carry):
        out, maximum, total = carry
        scores = _product(q, k.transpose((1, 0)))
        plgpu.barrier_arrive(k_done)
        scores = jnp.where(_sees(start + mine.start, index[0] * TILE, scores.shape), scores * scale, -jnp.inf)
        # Every query sees key 0, which is in the first block: from there on the maximum is finite.
        new_maximum = jnp.maximum(maximum, scores.max(axis=1))
        rescale = jnp.exp2(maximum - new_maximum)
        weights = jnp.exp2(scores - _along_rows(new_maximum, scores.shape))
        total = total * rescale + weights.sum(axis=1)
        out = _product(weights.astype(v.dtype), v, out * _along_rows(rescale, out.shape))
        plgpu.barrier_arrive(v_done)
        return out, new_maximum, total

    kv_head = lax.div(head, jnp.asarray(group, head.dtype))
    keys = plgpu.BlockSpec((TILE, head_dim), lambda block: (block, 0), transforms=_SWIZZLED)
    # Up to the one that the tile's last query is in, unless that one only fills up the tile and is past the end.
    blocks = lax.min(tile + 1 + pl.cdiv(start, TILE), k_ref.shape[1] // TILE)
    _pipeline(step, blocks, [keys, keys], compute)(k_ref.at[batch, :, kv_head], v_ref.at[batch, :, kv_head])


def _d_query_tile(
    group, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_q_ref,
    own_q, own_d_out, own_lse, own_delta, arrived,
):  # fmt: skip
    batch, head, tile, warpgroup, mine = _place(last_first=q_ref.shape[1])
    head_dim = q_ref.shape[3]
    q, d_out, lse, delta = (own.at[warpgroup] for own in (own_q, own_d_out, own_lse, own_delta))

    def compute(pipeline):
        for whole, own in ((q_ref, q), (d_out_ref, d_out)):
            plgpu.copy_gmem_to_smem(whole.at[batch, mine, head], own, arrived.at[warpgroup])
        for whole, own in ((lse_ref, lse), (delta_ref, delta)):
            plgpu.copy_gmem_to_smem(whole.at[batch, head, mine], own, arrived.at[warpgroup])
        plgpu.barrier_wait(arrived.at[warpgroup])
        d_q, *_ = pipeline((_zeros(head_dim), _load(lse, _ROW), _load(delta, _ROW)))
        q[...] = (d_q * head_dim**-0.5).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, d_q_ref.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    def step(index, k, v, k_done, v_done, carry):
        d_q, lse, delta = carry
        scores = _product(q, k.transpose((1, 0)))
        weights = jnp.exp2(scores * (head_dim**-0.5 * _LOG2E) - _along_rows(lse, scores.shape))
        weights = jnp.where(_sees(mine.start, index[0] * TILE, scores.shape), weights, 0.0)
        d_weights = _product(d_out, v.transpose((1, 0)))
        plgpu.barrier_arrive(v_done)
        d_scores = weights * (d_weights - _along_rows(delta, scores.shape))
        d_q = _product(d_scores.astype(k.dtype), k, d_q)
        plgpu.barrier_arrive(k_done)
        return d_q, lse, delta

    kv_head = lax.div(head, jnp.asarray(group, head.dtype))
    keys = plgpu.BlockSpec((TILE, head_dim), lambda block: (block, 0), transforms=_SWIZZLED)
    _pipeline(step, tile + 1, [keys, keys], compute)(k_ref.at[batch, :, kv_head], v_ref.at[batch, :, kv_head])


def _d_key_tile(
    group, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_k_ref, d_v_ref, own_k, own_v, arrived
):  # fmt: skip
    batch, head, tile, warpgroup, mine = _place()
    kv_head = lax.div(head, jnp.asarray(group, head.dtype))
    head_dim = q_ref.shape[3]
    k, v = own_k.at[warpgroup], own_v.at[warpgroup]
    # Half as many queries at a time: both sums and two products of them take all registers. From the last on, so
    # that the first block does not depend on the tile.
    blocks = q_ref.shape[1] // _HALF
    block_of = lambda i: blocks - 1 - i

    def compute(pipeline):
        for whole, own in ((k_ref, k), (v_ref, v)):
            plgpu.copy_gmem_to_smem(whole.at[batch, mine, kv_head], own, arrived.at[warpgroup])
        plgpu.barrier_wait(arrived.at[warpgroup])
        d_k, d_v = pipeline((_zeros(head_dim), _zeros(head_dim)))
        k[...] = (d_k * head_dim**-0.5).astype(k.dtype)
        v[...] = d_v.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, d_k_ref.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(v, d_v_ref.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    def step(index, q, d_out, lse, delta, q_done, d_out_done, lse_done, delta_done, carry):
        d_k, d_v = carry
        # Keys by queries, so that no product needs its left side turned.
        scores = _product(k, q.transpose((1, 0)))
        lse = lax.broadcast_in_dim(_load(lse, _COLUMN), scores.shape, [1])
        plgpu.barrier_arrive(lse_done)
        weights = jnp.exp2(scores * (head_dim**-0.5 * _LOG2E) - lse)
        sees = _sees(block_of(index[0]) * _HALF, mine.start, scores.shape, query_dim=1)
        weights = jnp.where(sees, weights, 0.0)
        d_v = _product(weights.astype(d_out.dtype), d_out, d_v)
        d_weights = _product(v, d_out.transpose((1, 0)))
        plgpu.barrier_arrive(d_out_done)
        delta = lax.broadcast_in_dim(_load(delta, _COLUMN), scores.shape, [1])
        plgpu.barrier_arrive(delta_done)
        d_k = _product((weights * (d_weights - delta)).astype(q.dtype), q, d_k)
        plgpu.barrier_arrive(q_done)
        return d_k, d_v

    queries = plgpu.BlockSpec((_HALF, head_dim), lambda i: (block_of(i), 0), transforms=_SWIZZLED)
    rows = plgpu.BlockSpec((_HALF,), lambda i: (block_of(i),))
    steps = blocks - tile * _WARPGROUPS
    looked_at = (q_ref.at[batch, :, head], d_out_ref.at[batch, :, head], lse_ref.at[batch, head])
    _pipeline(step, steps, [queries, queries, rows, rows], compute)(*looked_at, delta_ref.at[batch, head])


def _place(last_first: int = 0):
    """Batch row, head, tile and warpgroup at work here, and its positions. `last_first`: tiles of so many positions
    from the last on, which sees most, so that the short ones fill up the end.
    """
    batch, head, tile, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "tile", "warpgroup"))
    if last_first:
        tile = last_first // TILE - 1 - tile
    return batch, head, tile, warpgroup, pl.ds(tile * TILE + warpgroup * _HALF, _HALF)


def _pipeline(step, steps, in_specs, compute):
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


def _halves(x: Array) -> plgpu.SMEM:
    return plgpu.SMEM((_WARPGROUPS, _HALF, x.shape[-1]), x.dtype, transforms=_SWIZZLED)


def _half_rows() -> plgpu.SMEM:
    return plgpu.SMEM((_WARPGROUPS, _HALF), jnp.float32)


def _zeros(head_dim: int):
    return plgpu.layout_cast(jnp.zeros((_HALF, head_dim), jnp.float32), _MATRIX)


def _product(a, b, onto=None):
    """a b (+ onto) on the tensor cores, in float32; `b` in shared memory, `a` there or in registers."""
    multiply = lambda sums: plgpu.wgmma(sums, a, b)
    if onto is not None:
        return pl.run_state(multiply)(plgpu.ACC.init(onto))

    def scope(sums):
        multiply(sums)
        return sums[...]

    return pl.run_scoped(scope, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _load(ref, layout):
    # jax 0.10 asks for an index, jax 0.12 takes none.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout)


def _along_rows(row, shape):
    return lax.broadcast_in_dim(row, shape, [0])


def _sees(first_query, first_key, shape, query_dim=0):
    """Which query may look at which key, both counted from the first ones on."""
    position = lambda dim: plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=_MATRIX)
    return position(query_dim) + first_query >= position(1 - query_dim) + first_key
