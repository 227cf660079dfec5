"""Products of rows with the matrix of their group, on a Hopper GPU: Pallas kernels for its tensor cores.

Rows lie group by group, each group beginning with a tile (`Groups`), so that a tile of rows has one matrix and kernels
need no masks: what is computed of the rows between groups is never read. Only tiles that hold rows are visited,
however many there could be, and a matrix is read only if its group has rows.

A thread block has one warpgroup that moves tiles of both sides into shared memory and one or two that multiply 64 rows
each. Blocks stay on their multiprocessor and take tile after tile
(https://docs.jax.dev/en/latest/pallas/gpu/reference.html).
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

import sharding

TILES = 64, 128
"""Rows that a tile may have: 64 for each warpgroup that multiplies."""

MULTIPLE = 128
"""Of which all widths of matrices have to be multiples."""

_DEPTH = 64
"""How much of the dimension summed over is in one stage: 128 bytes, the widest line of shared memory's swizzling."""

_SHARED = 192 << 10
"""Bytes of shared memory for stages in flight, of the 227 KiB that a thread block may have."""

_ABREAST = 16
"""Tiles of rows that are worked on side by side, so that they share the matrices' tiles in the second-level cache."""

_EPILOGUE = 64
"""Columns of a result that a warpgroup puts into shared memory at once, on their way out."""


class Groups(NamedTuple):
    """Where the rows of each group lie."""

    count: Int[Array, "groups"]
    """Rows of each group."""
    first: Int[Array, "groups"]
    """The first row of each group, that of a tile."""
    group_of_tile: Int[Array, "tiles"]
    rows_of_tile: Int[Array, "tiles"]
    """How many rows of a tile are its group's, which come first. Of a tile without any the group may be anything."""
    tiles: Int[Array, "1"]
    """How many tiles to look at, the first ones."""

    @classmethod
    def of(cls, count: Int[Array, "groups"], most: int, tile: int) -> "Groups":
        """Groups of so many rows in tiles of `tile` rows, `most` tiles at most in all."""
        tiles = (count + tile - 1) // tile
        ends = jnp.cumsum(tiles)
        number = jnp.arange(most)
        group = jnp.minimum(jnp.sum(number[:, None] >= ends, axis=1, dtype=jnp.int32), count.size - 1)
        first = (ends - tiles) * tile
        rows = jnp.clip((first + count)[group] - number * tile, 0, tile)
        return cls(count, first, group, rows, ends[-1:])


def grouped_matmul(
    x: Float[Array, "rows in"],
    w: Float[Array, "groups in out"],
    groups: Groups,
    *,
    transposed: bool = False,
) -> Float[Array, "rows out"]:
    """x[r] @ w[group of r], or with `transposed` x[r] @ w[group of r].T, where w is [groups, out, in].

    Rows that are of no group hold anything.
    """
    return _rows_kernel(x, w, groups, "sum", transposed, sharding.multiprocessors())


def grouped_swiglu(
    x: Float[Array, "rows in"], w: Float[Array, "groups in 2 hidden"], groups: Groups
) -> Float[Array, "rows hidden"]:
    """silu(x[r] gate) * (x[r] up), gate and up being those of the row's group; nothing else is written to memory."""
    return _rows_kernel(x, w.reshape(*w.shape[:2], -1), groups, "swiglu", False, sharding.multiprocessors())


def grouped_outer(
    x: Float[Array, "rows in"], y: Float[Array, "rows out"], groups: Groups
) -> Float[Array, "groups in out"]:
    """The sum over the rows of each group of x[r]' y[r]: the gradient of its matrix.

    Rows between groups count too, up to the next tile: they must be zero in one of both, and finite.
    """
    return _columns_kernel(x, y, groups, sharding.multiprocessors())


# Compiled functions of their own, so that a kernel is lowered once for all layers: half a second each time.
@functools.partial(jax.jit, static_argnums=3)
def _columns_kernel(x: Array, y: Array, groups: Groups, multiprocessors: int) -> Array:
    (_, into), (_, out), dtype = x.shape, y.shape, x.dtype
    width = 256 if out % 256 == 0 else 128
    swizzled, along, across = _swizzled(dtype), into // 128, out // width
    stages = _SHARED // (_DEPTH * (128 + width) * dtype.itemsize)

    def grouped_columns(x_gmem, y_gmem, count, first, out_gmem):
        def pipeline(body, compute, steps):
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(steps,),
                memory_registers=40,
                in_specs=[
                    plgpu.BlockSpec((_DEPTH, size), lambda k: (k, 0), transforms=swizzled) for size in (128, width)
                ],
                wg_axis="warpgroup",
                num_compute_wgs=2,
                max_concurrent_steps=stages,
                manual_consumed_barriers=True,
                compute_context=compute,
            )

        nothing = lambda *_, **__: None

        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(nothing, nothing, stages).get_allocations(x_gmem, y_gmem),
            out_smem=plgpu.SMEM((2, 2, 64, _EPILOGUE), dtype, transforms=swizzled),
            collective_axes="warpgroup",
        )
        def _(allocations, out_smem):
            warpgroup = jax.lax.axis_index("warpgroup")
            share = pl.ds(warpgroup * 64, 64)

            @plgpu.nd_loop((count.shape[0], across, along), collective_axes="multiprocessor")
            def _(loop):
                group, column, row = loop.index
                start = pl.multiple_of(first[group], _DEPTH)
                steps = jax.lax.div(count[group] + (_DEPTH - 1), jnp.int32(_DEPTH))
                # As long as the whole array, past whose end nothing is read: a slice's length cannot vary.
                rows = pl.ds(start, x_gmem.shape[0])

                def compute(evaluate):
                    def scope(sums):
                        evaluate(sums)
                        plgpu.wgmma_wait(0)
                        _release(allocations, steps - 1, stages)
                        out_tile = out_gmem.at[group, pl.ds(row * 128, 128), pl.ds(column * width, width)].at[share]
                        _write(out_smem.at[warpgroup], out_tile, sums[...])

                    pl.run_scoped(scope, plgpu.ACC((64, width), jnp.float32))

                def multiply(step, x_smem, y_smem, *barriers_and_sums):
                    sums = barriers_and_sums[-1]
                    plgpu.wgmma(sums, x_smem.at[:, share].transpose((1, 0)), y_smem)
                    plgpu.wgmma_wait(1)
                    _release(allocations, step[0] - 1, stages)
                    return sums

                pipeline(multiply, compute, steps)(
                    x_gmem.at[rows, pl.ds(row * 128, 128)],
                    y_gmem.at[rows, pl.ds(column * width, width)],
                    allocations=allocations,
                )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    args = (x, y, groups.count, groups.first)
    return _launch(grouped_columns, (groups.count.size, into, out), dtype, 2, multiprocessors, args)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _rows_kernel(
    x: Array, w: Array, groups: Groups, result: Literal["sum", "swiglu"], transposed: bool, multiprocessors: int
) -> Array:
    """A product with each part of a matrix's columns, one or gate and up, and of them the result."""
    depth, dtype, parts = x.shape[1], x.dtype, {"sum": 1, "swiglu": 2}[result]
    columns = w.shape[1 if transposed else 2] // parts
    tiles_at_most = groups.group_of_tile.size
    tile = x.shape[0] // tiles_at_most
    width = _width(columns, tiles_at_most, parts, multiprocessors)
    workers, across, swizzled = tile // 64, columns // width, _swizzled(dtype)
    stages = min(8, _SHARED // (_DEPTH * (tile + width * parts) * dtype.itemsize))

    def grouped_rows(x_gmem, w_gmem, group_of_tile, rows_of_tile, tiles, out_gmem):
        steps = depth // _DEPTH
        pipeline = functools.partial(
            plgpu.emit_pipeline_warp_specialized,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((tile, _DEPTH), lambda k: (0, k), transforms=swizzled),
                *[
                    plgpu.BlockSpec(
                        (width, _DEPTH) if transposed else (_DEPTH, width),
                        (lambda k: (0, k)) if transposed else (lambda k: (k, 0)),
                        transforms=swizzled,
                    )
                ]
                * parts,
            ],
            wg_axis="warpgroup",
            num_compute_wgs=workers,
            max_concurrent_steps=stages,
            manual_consumed_barriers=True,
        )
        nothing = lambda *_, **__: None
        allocations = pipeline(nothing, compute_context=nothing).get_allocations(x_gmem, *[w_gmem.at[0]] * parts)

        @functools.partial(
            pl.run_scoped,
            allocations=allocations,
            out_smem=plgpu.SMEM((workers, 2, 64, _EPILOGUE), dtype, transforms=swizzled),
            collective_axes="warpgroup",
        )
        def _(allocations, out_smem):
            warpgroup = jax.lax.axis_index("warpgroup")
            share = pl.ds(warpgroup * 64, 64)

            @plgpu.nd_loop((tiles[0] * across,), collective_axes="multiprocessor")
            def _(loop):
                row, column = _place(loop.index[0], tiles[0], across)
                group, rows = group_of_tile[row], rows_of_tile[row]

                def of_group(part):
                    place = pl.ds(part * columns + column * width, width)
                    return w_gmem.at[group, place, :] if transposed else w_gmem.at[group, :, place]

                def compute(evaluate):
                    def scope(*accumulators):
                        evaluate(accumulators)
                        plgpu.wgmma_wait(0)
                        _release(allocations, steps - 1, stages)
                        out_tile = out_gmem.at[pl.ds(row * tile, tile), pl.ds(column * width, width)].at[share]
                        _write(out_smem.at[warpgroup], out_tile, _result(*accumulators))

                    pl.run_scoped(scope, *[plgpu.ACC((64, width), jnp.float32)] * parts)

                def work(only_some):
                    def multiply(step, x_smem, *rest):
                        parts_smem, accumulators = rest[:parts], rest[-1]

                        def products():
                            for accumulator, part in zip(accumulators, parts_smem, strict=True):
                                right = part.transpose((1, 0)) if transposed else part
                                plgpu.wgmma(accumulator, x_smem.at[share], right)
                            plgpu.wgmma_wait(parts)

                        pl.when(warpgroup * 64 < rows)(products) if only_some else products()
                        _release(allocations, step[0] - 1, stages)
                        return accumulators

                    rows_gmem = x_gmem.at[pl.ds(row * tile, tile), :]
                    pipeline(multiply, compute_context=compute)(
                        rows_gmem, *map(of_group, range(parts)), allocations=allocations
                    )

                # A group's last tile may have rows for one warpgroup only. To ask in each step costs all tiles time.
                pl.when(rows > tile - 64)(lambda: work(False))
                if workers > 1:
                    pl.when((rows > 0) & (rows <= tile - 64))(lambda: work(True))

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    args = (x, w, groups.group_of_tile, groups.rows_of_tile, groups.tiles)
    return _launch(grouped_rows, (x.shape[0], columns), dtype, workers, multiprocessors, args)


def _result(*accumulators) -> Float[Array, "64 width"]:
    """The sums themselves, or of the sums of gate and up silu(gate) * up."""
    if len(accumulators) == 1:
        return accumulators[0][...]
    gate, up = (sums[...] for sums in accumulators)
    return gate / (1 + jnp.exp(-gate)) * up


def _release(allocations: dict, step: int | Int[Array, ""], stages: int) -> None:
    """Say that a pipeline's step, if it was one, has been multiplied, so that its stage can be filled anew.

    By hand, so that a step is multiplied while the next begins: with the pipeline's own `delay_release` nobody waits
    for the last step, and the next tile's first ones may overwrite it.
    """

    @pl.when(step >= 0)
    def _():
        for barrier in allocations["flat_consumed_barrier_refs"]:
            plgpu.barrier_arrive(barrier.at[jax.lax.rem(step, stages)])


def _write(smem, out_gmem, result: Float[Array, "64 width"]) -> None:
    """A warpgroup's `result` to where it belongs, _EPILOGUE columns after the other, through two places in turn."""
    parts = result.shape[1] // _EPILOGUE
    for part in range(parts):
        columns = slice(part * _EPILOGUE, (part + 1) * _EPILOGUE)
        # The place is free again when all but what left from the other one have been read.
        plgpu.wait_smem_to_gmem(min(parts - 1, 1), wait_read_only=True)
        smem[part % 2] = result[:, columns].astype(smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[part % 2], out_gmem.at[:, pl.ds(part * _EPILOGUE, _EPILOGUE)])


def _width(columns: int, tiles: int, parts: int, multiprocessors: int) -> int:
    """Columns of a tile: as many as the registers hold of 64 rows, fewer if too many multiprocessors had none."""
    fitting = [width for width in (256, 128, 64) if columns % width == 0 and width * parts <= 256]
    busy = [width for width in fitting if tiles * (columns // width) >= 0.9 * multiprocessors]
    return max(busy, default=fitting[-1])


def _place(number: Int[Array, ""], tiles: Int[Array, ""], across: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Row and column of the tile that comes so many-th: a band of _ABREAST rows of tiles after the other."""
    band = jax.lax.div(number, jnp.int32(_ABREAST * across))
    high = jnp.minimum(_ABREAST, tiles - band * _ABREAST)
    within = number - band * (_ABREAST * across)
    return band * _ABREAST + jax.lax.rem(within, high), jax.lax.div(within, high)


def _swizzled(dtype: jnp.dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _launch(
    kernel: Callable,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    workers: int,
    multiprocessors: int,
    args: tuple[Array, ...],
) -> Array:
    """`kernel` on every multiprocessor, with so many warpgroups that multiply."""
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return sharding.pvary_like(run(*args), *args)
