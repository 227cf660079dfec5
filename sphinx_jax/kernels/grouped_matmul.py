"""Grouped matrix products for Hopper GPUs in Pallas: each row times the matrix of its group.

Rows are sorted by group, and each group starts at a multiple of the tile size (`Groups`). So a tile of rows needs one
matrix, and the kernels need no masks: rows between groups are computed and never read. Only tiles that hold rows are
computed, whatever their maximum number, and only matrices of groups that have rows are read.

The kernels are persistent: one thread block per multiprocessor computes tile after tile. One of its warpgroups copies
blocks of both operands into shared memory, a pipeline of several stages; one or two multiply, 64 rows of the tile each,
and accumulate in registers in float32 (https://docs.jax.dev/en/latest/pallas/gpu/reference.html).
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import sharding

TILE_ROWS = 64, 128
"""Supported rows of a tile: 64, the rows of one wgmma instruction, for each warpgroup that multiplies."""

WIDTH_MULTIPLE = 128
"""Both dimensions of the matrices must be multiples of it."""

_WARPGROUP_ROWS = 64

_BLOCK_K = 64
"""Contracted dimension of one stage: 64 16-bit numbers are 128 bytes, the widest swizzle of shared memory."""

_STAGES_BYTES = 192 << 10
"""Shared memory for the stages of the pipeline, of the 227 KiB of a thread block. Up to 32 KiB are for the epilogue."""

_RASTER_TILES = 16
"""Tiles of rows in a band of the rasterisation order: those computed at the same time share the blocks of a matrix in
the second-level cache."""

_EPILOGUE_COLUMNS = 64
"""Columns of a result that a warpgroup writes through shared memory at once: 128 bytes, as above."""

_Accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]  # public, though not re-exported explicitly


class Groups(NamedTuple):
    """Where the rows of each group are, and the group of each tile of rows."""

    count: Int[Array, "groups"]
    """Rows of each group."""
    first: Int[Array, "groups"]
    """The first row of each group, a multiple of the tile size."""
    group_of_tile: Int[Array, "tiles"]
    rows_of_tile: Int[Array, "tiles"]
    """Rows of a tile that belong to its group; they come first. Where it is 0, the tile's group is arbitrary."""
    num_tiles: Int[Array, "1"]
    """Tiles to compute, the first ones."""

    @classmethod
    def from_counts(cls, count: Int[Array, "groups"], max_tiles: int, tile_rows: int) -> "Groups":
        """Consecutive groups of `count` rows in tiles of `tile_rows`; at most `max_tiles` tiles in all."""
        # Each group is padded to whole tiles, so that the next one starts with a tile.
        tiles = (count + tile_rows - 1) // tile_rows
        ends = jnp.cumsum(tiles)
        index = jnp.arange(max_tiles)
        # The group of a tile: how many groups end before or at it.
        group = jnp.minimum(jnp.sum(index[:, None] >= ends, axis=1, dtype=jnp.int32), count.size - 1)
        first = (ends - tiles) * tile_rows
        # A full tile for all but a group's last one; none for the tiles past the last group.
        rows = jnp.clip((first + count)[group] - index * tile_rows, 0, tile_rows)
        return cls(count, first, group, rows, ends[-1:])


def grouped_matmul(
    x: Float[Array, "rows in"],
    w: Float[Array, "groups in out"] | Float[Array, "groups out in"],
    groups: Groups,
    *,
    transposed: bool = False,
) -> Float[Array, "rows out"]:
    """x[r] @ w[group of r], or with `transposed` x[r] @ w[group of r].T, where w is [groups, out, in].

    Rows of the result that belong to no group are undefined.
    """
    return _grouped_matmul(x, w, groups, "identity", transposed, sharding.multiprocessors())


def grouped_swiglu(
    x: Float[Array, "rows in"], w: Float[Array, "groups in 2 hidden"], groups: Groups
) -> Float[Array, "rows hidden"]:
    """silu(x[r] gate) * (x[r] up) with gate and up of the row's group; only the result is written to memory."""
    return _grouped_matmul(x, w.reshape(*w.shape[:2], -1), groups, "swiglu", False, sharding.multiprocessors())


def grouped_outer(
    x: Float[Array, "rows in"], y: Float[Array, "rows out"], groups: Groups
) -> Float[Array, "groups in out"]:
    """Sum over the rows of each group of x[r]' y[r]: the gradient of its matrix.

    The sum includes the rows between a group's last one and the next multiple of 64: they must be zero in x or y, and
    finite in both.
    """
    return _grouped_outer(x, y, groups, sharding.multiprocessors())


# The kernels are called from jitted functions, so that each is lowered once for all layers: half a second per call.
@functools.partial(jax.jit, static_argnums=3)
def _grouped_outer(
    x: Float[Array, "rows in"], y: Float[Array, "rows out"], groups: Groups, multiprocessors: int
) -> Float[Array, "groups in out"]:
    """A tile is [128, width] of one group's matrix; the contracted dimension is the group's rows."""
    (_, into), (_, out), dtype = x.shape, y.shape, x.dtype
    # 256 columns are 128 float32 registers per thread for the accumulator [64, 256] of a warpgroup.
    width = 256 if out % 256 == 0 else 128
    swizzle, tiles_down, tiles_across = _swizzle(dtype), into // 128, out // width
    stages = _STAGES_BYTES // (_BLOCK_K * (128 + width) * dtype.itemsize)

    def grouped_outer_kernel(x_gmem, y_gmem, count, first, out_gmem):
        def pipeline(body, compute, steps):
            # A stage holds 64 rows: [64, 128] of x and [64, width] of y.
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(steps,),
                memory_registers=40,
                in_specs=[
                    plgpu.BlockSpec((_BLOCK_K, size), lambda k: (k, 0), transforms=swizzle) for size in (128, width)
                ],
                wg_axis="warpgroup",
                num_compute_wgs=2,
                max_concurrent_steps=stages,
                manual_consumed_barriers=True,
                compute_context=compute,
            )

        # Stages and barriers are allocated once for all tiles: they must outlive the pipeline of each.
        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(_no_op, _no_op, stages).get_allocations(x_gmem, y_gmem),
            out_smem=plgpu.SMEM((2, 2, _WARPGROUP_ROWS, _EPILOGUE_COLUMNS), dtype, transforms=swizzle),
            collective_axes="warpgroup",
        )
        def _(allocations, out_smem):
            warpgroup = jax.lax.axis_index("warpgroup")
            own_rows = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)

            # The tiles of a group are adjacent and tiles_down varies fastest: thread blocks that run at the same time
            # share the group's rows of y in the second-level cache.
            @plgpu.nd_loop((count.shape[0], tiles_across, tiles_down), collective_axes="multiprocessor")
            def _(loop):
                group, column, row = loop.index
                start = pl.multiple_of(first[group], _BLOCK_K)
                # A group without rows has no steps: its gradient is the zero accumulator.
                steps = jax.lax.div(count[group] + (_BLOCK_K - 1), jnp.int32(_BLOCK_K))
                # The length of a slice is static: that of the whole array, of which the steps read the group's part.
                rows = pl.ds(start, x_gmem.shape[0])

                def compute(run_steps):
                    def scope(accumulator):
                        run_steps(accumulator)
                        # The last product is still running; await it, then release its stage.
                        plgpu.wgmma_wait(0)
                        _release_stage(allocations, steps - 1, stages)
                        out_tile = out_gmem.at[group, pl.ds(row * 128, 128), pl.ds(column * width, width)].at[own_rows]
                        _store(out_smem.at[warpgroup], out_tile, accumulator[...])

                    pl.run_scoped(scope, _Accumulator((_WARPGROUP_ROWS, width), jnp.float32))

                def multiply(step, x_smem, y_smem, *barriers_and_accumulator):
                    accumulator = barriers_and_accumulator[-1]
                    # [64, 64]' [64, width]: a warpgroup takes its 64 columns of x, its rows of the result.
                    plgpu.wgmma(accumulator, x_smem.at[:, own_rows].transpose((1, 0)), y_smem)
                    # One product may be running: the one before is complete, and its stage free.
                    plgpu.wgmma_wait(1)
                    _release_stage(allocations, step[0] - 1, stages)
                    return accumulator

                pipeline(multiply, compute, steps)(
                    x_gmem.at[rows, pl.ds(row * 128, 128)],
                    y_gmem.at[rows, pl.ds(column * width, width)],
                    allocations=allocations,
                )

            # Copies to global memory must have read shared memory before the thread block ends.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    args = (x, y, groups.count, groups.first)
    return _launch(grouped_outer_kernel, (groups.count.size, into, out), dtype, 2, multiprocessors, args)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _grouped_matmul(
    x: Float[Array, "rows in"],
    w: Float[Array, "groups k n"],
    groups: Groups,
    epilogue: Literal["identity", "swiglu"],
    transposed: bool,
    multiprocessors: int,
) -> Float[Array, "rows out"]:
    """A tile is [tile_rows, width] of the result; the contracted dimension is that of the matrices.

    For "swiglu" w holds gate and up next to each other, and a tile multiplies by `width` columns of either.
    """
    depth, dtype, parts = x.shape[1], x.dtype, {"identity": 1, "swiglu": 2}[epilogue]
    columns = w.shape[1 if transposed else 2] // parts
    # The shapes give the tile size: x has max_tiles whole tiles of rows.
    max_tiles = groups.group_of_tile.size
    tile_rows = x.shape[0] // max_tiles
    width = _tile_width(columns, max_tiles, parts, multiprocessors)
    # One warpgroup per 64 rows; both multiply by the same blocks of w, which are in shared memory once.
    warpgroups, tiles_across, swizzle = tile_rows // _WARPGROUP_ROWS, columns // width, _swizzle(dtype)
    stages = min(8, _STAGES_BYTES // (_BLOCK_K * (tile_rows + width * parts) * dtype.itemsize))

    def grouped_matmul_kernel(x_gmem, w_gmem, group_of_tile, rows_of_tile, num_tiles, out_gmem):
        steps = depth // _BLOCK_K
        # A stage holds 64 of the contracted dimension: [tile_rows, 64] of x, and [64, width] of each part of w.
        w_spec = plgpu.BlockSpec(
            (width, _BLOCK_K) if transposed else (_BLOCK_K, width),
            (lambda k: (0, k)) if transposed else (lambda k: (k, 0)),
            transforms=swizzle,
        )
        pipeline = functools.partial(
            plgpu.emit_pipeline_warp_specialized,
            grid=(steps,),
            memory_registers=40,
            in_specs=[plgpu.BlockSpec((tile_rows, _BLOCK_K), lambda k: (0, k), transforms=swizzle), *[w_spec] * parts],
            wg_axis="warpgroup",
            num_compute_wgs=warpgroups,
            max_concurrent_steps=stages,
            manual_consumed_barriers=True,
        )
        allocations = pipeline(_no_op, compute_context=_no_op).get_allocations(x_gmem, *[w_gmem.at[0]] * parts)

        # Stages and barriers are allocated once for all tiles: they must outlive the pipeline of each.
        @functools.partial(
            pl.run_scoped,
            allocations=allocations,
            out_smem=plgpu.SMEM((warpgroups, 2, _WARPGROUP_ROWS, _EPILOGUE_COLUMNS), dtype, transforms=swizzle),
            collective_axes="warpgroup",
        )
        def _(allocations, out_smem):
            warpgroup = jax.lax.axis_index("warpgroup")
            own_rows = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)

            # A dynamic number of tiles, dealt to the multiprocessors in turn: number b, b + multiprocessors, ...
            @plgpu.nd_loop((num_tiles[0] * tiles_across,), collective_axes="multiprocessor")
            def _(loop):
                row, column = _raster_position(loop.index[0], num_tiles[0], tiles_across)
                group, rows = group_of_tile[row], rows_of_tile[row]

                def matrix_columns(part):
                    """The tile's columns of a part of its group's matrix."""
                    slice_ = pl.ds(part * columns + column * width, width)
                    return w_gmem.at[group, slice_, :] if transposed else w_gmem.at[group, :, slice_]

                def compute(run_steps):
                    def scope(*accumulators):
                        run_steps(accumulators)
                        # The last step's products are still running; await them, then release their stage.
                        plgpu.wgmma_wait(0)
                        _release_stage(allocations, steps - 1, stages)
                        out_tile = out_gmem.at[pl.ds(row * tile_rows, tile_rows), pl.ds(column * width, width)]
                        _store(out_smem.at[warpgroup], out_tile.at[own_rows], _apply_epilogue(*accumulators))

                    pl.run_scoped(scope, *[_Accumulator((_WARPGROUP_ROWS, width), jnp.float32)] * parts)

                def run_tile(skip_empty_warpgroup):
                    def multiply(step, x_smem, *rest):
                        # `rest` is the parts of w, the barriers of all inputs, and the carry.
                        parts_smem, accumulators = rest[:parts], rest[-1]

                        def products():
                            for accumulator, part in zip(accumulators, parts_smem, strict=True):
                                right = part.transpose((1, 0)) if transposed else part
                                plgpu.wgmma(accumulator, x_smem.at[own_rows], right)
                            # This step's products may be running: the step before is complete, and its stage free.
                            plgpu.wgmma_wait(parts)

                        pl.when(warpgroup * _WARPGROUP_ROWS < rows)(products) if skip_empty_warpgroup else products()
                        _release_stage(allocations, step[0] - 1, stages)
                        return accumulators

                    # The copying warpgroup starts with the next tile while the others are in this one's epilogue.
                    rows_gmem = x_gmem.at[pl.ds(row * tile_rows, tile_rows), :]
                    pipeline(multiply, compute_context=compute)(
                        rows_gmem, *map(matrix_columns, range(parts)), allocations=allocations
                    )

                # The last tile of a group may have rows for the first warpgroup only. Testing for it in each step would
                # slow down all tiles, so such tiles have a loop of their own.
                pl.when(rows > tile_rows - _WARPGROUP_ROWS)(lambda: run_tile(False))
                if warpgroups > 1:
                    pl.when((rows > 0) & (rows <= tile_rows - _WARPGROUP_ROWS))(lambda: run_tile(True))

            # Copies to global memory must have read shared memory before the thread block ends.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    args = (x, w, groups.group_of_tile, groups.rows_of_tile, groups.num_tiles)
    return _launch(grouped_matmul_kernel, (x.shape[0], columns), dtype, warpgroups, multiprocessors, args)


def _no_op(*_, **__) -> None:
    """In place of a pipeline's body, where only its allocations are asked for."""


def _apply_epilogue(*accumulators) -> Float[Array, "64 width"]:
    """One accumulator as it is; of gate and up silu(gate) * up."""
    if len(accumulators) == 1:
        return accumulators[0][...]
    # In float32, before the one rounding to the dtype of the result.
    gate, up = (accumulator[...] for accumulator in accumulators)
    return gate / (1 + jnp.exp(-gate)) * up


def _release_stage(allocations: dict, step: int | Int[Array, ""], stages: int) -> None:
    """Let the copying warpgroup refill the stage of `step`, whose products are complete. Nothing for step -1.

    By hand, so that the products of a step overlap with those of the next. With the pipeline's own `delay_release`
    nothing waits for the last step, and the first copies of the next tile may overwrite its stage.
    """

    @pl.when(step >= 0)
    def _():
        for barrier in allocations["flat_consumed_barrier_refs"]:
            plgpu.barrier_arrive(barrier.at[jax.lax.rem(step, stages)])


def _store(smem, out_gmem, result: Float[Array, "64 width"]) -> None:
    """Write a warpgroup's `result` to global memory, _EPILOGUE_COLUMNS at a time through two buffers in `smem`."""
    chunks = result.shape[1] // _EPILOGUE_COLUMNS
    for chunk in range(chunks):
        columns = slice(chunk * _EPILOGUE_COLUMNS, (chunk + 1) * _EPILOGUE_COLUMNS)
        # The buffer is free when every copy but the latest, which is from the other buffer, has read its own.
        plgpu.wait_smem_to_gmem(min(chunks - 1, 1), wait_read_only=True)
        smem[chunk % 2] = result[:, columns].astype(smem.dtype)
        # Writes to shared memory must be visible to the asynchronous copy before it starts.
        plgpu.commit_smem()
        out_columns = pl.ds(chunk * _EPILOGUE_COLUMNS, _EPILOGUE_COLUMNS)
        plgpu.copy_smem_to_gmem(smem.at[chunk % 2], out_gmem.at[:, out_columns])


def _tile_width(columns: int, tiles: int, parts: int, multiprocessors: int) -> int:
    """Columns of a tile: the most whose accumulators fit, or fewer where that leaves multiprocessors without a tile.

    `parts` accumulators [64, width] of float32 may take 128 of a thread's about 230 registers: width * parts <= 256.
    """
    fitting = [width for width in (256, 128, 64) if columns % width == 0 and width * parts <= 256]
    busy = [width for width in fitting if tiles * (columns // width) >= 0.9 * multiprocessors]
    return max(busy, default=fitting[-1])


def _raster_position(
    index: Int[Array, ""], num_tiles: Int[Array, ""], tiles_across: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Row and column of tile number `index`: bands of _RASTER_TILES rows of tiles, column by column within a band."""
    band = jax.lax.div(index, jnp.int32(_RASTER_TILES * tiles_across))
    # The last band may have fewer rows.
    height = jnp.minimum(_RASTER_TILES, num_tiles - band * _RASTER_TILES)
    within_band = index - band * (_RASTER_TILES * tiles_across)
    return band * _RASTER_TILES + jax.lax.rem(within_band, height), jax.lax.div(within_band, height)


def _swizzle(dtype: DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The layout of matrices in shared memory that wgmma reads without bank conflicts: 8 rows of 128 bytes."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _launch(
    kernel: Callable,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    warpgroups: int,
    multiprocessors: int,
    args: tuple[Array, ...],
) -> Array:
    """`kernel` as one thread block per multiprocessor, of one warpgroup that copies and `warpgroups` that multiply."""
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return sharding.pvary_like(run(*args), *args)
