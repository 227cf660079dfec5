"""The fixed set of programs that a scheduler runs, compiled before the first request arrives.

What a request is like (its length, its image, its sampling, its stop strings, what of it is cached) decides which of
these programs serve it; none needs another.
"""

from collections.abc import Callable, Iterator

from sphinx_jax.inference.bucketing import (
    SERVER_CHUNKS,
    ChunkSizes,
    batch_sizes,
    kv_bucket,
)
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.program_specs import Decode, Encode, Prefill, ProgramSpec, compile_specs
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.scheduler import MIN_REUSED


def programs(engine: Engine, shape: StateShape, chunks: ChunkSizes = SERVER_CHUNKS) -> list[ProgramSpec]:
    """Every program that a scheduler can run on a state of `shape`, besides the one that makes the state.

    Their number does not grow with the model. With the chunks of a server, on a GPU that prefills 2,048 tokens at a
    time, and 16 sequences of 4,096 positions: 34 for SPHINX-MoE.
    """
    return [*_encodes(engine, shape, chunks), *_prefills(engine, shape, chunks), *_decodes(engine, shape)]


def _encodes(engine: Engine, shape: StateShape, chunks: ChunkSizes) -> Iterator[Encode]:
    if engine.config.vision is None:
        return
    sizes = {spec.batch for spec in _prefills(engine, shape, chunks) if spec.has_image}
    yield from map(Encode, engine.encoder_sizes(sorted(sizes)))


def _prefills(engine: Engine, shape: StateShape, chunks: ChunkSizes) -> Iterator[Prefill]:
    has_vision = engine.config.vision is not None
    for has_image, start in [(True, 0)] * has_vision + [(False, 0), (False, MIN_REUSED)]:
        num_image_tokens = engine.config.num_image_tokens * has_image
        shortest = 1
        for length in chunks.lengths:
            before = num_image_tokens + start
            # A prompt of the least tokens that are padded to this length.
            fits = before + length <= shape.cache_len and before + shortest < engine.max_model_len
            if shortest > engine.prefill_tokens or not fits:
                break
            for batch in batch_sizes(length, num_image_tokens, chunks, engine.groups, shape.num_seqs):
                yield Prefill(batch * engine.groups, length, has_image, start)
            shortest = length + 1


def _decodes(engine: Engine, shape: StateShape) -> Iterator[Decode]:
    filled = range(1, shape.cache_len + 1)
    yield from map(Decode, sorted({kv_bucket(n, shape.cache_len, engine.kv_slice_cost) for n in filled}))


def compile_all(
    engine: Engine,
    shape: StateShape,
    chunks: ChunkSizes = SERVER_CHUNKS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compile every program of `programs`, and the one that makes the state; none is run.

    The persistent compilation cache is used if it is enabled. `on_progress` is called in this thread with the number
    of programs that are compiled and their total.
    """
    compile_specs(engine, shape, programs(engine, shape, chunks), on_progress)


def working_bytes(engine: Engine, shape: StateShape, chunks: ChunkSizes) -> int:
    """Bytes on each device of the temporaries and results of the largest program, besides the state.

    The programs with the most tokens or images are compiled and not run.
    """
    by_kind: dict[tuple, ProgramSpec] = {}
    for spec in sorted(programs(engine, shape, chunks), key=_size):
        kind = (spec.has_image, spec.start) if isinstance(spec, Prefill) else ()
        by_kind[(type(spec), kind)] = spec
    compile_specs(engine, shape, list(by_kind.values()))
    return engine.working_bytes


def _size(spec: ProgramSpec) -> int:
    return spec.batch * spec.length if isinstance(spec, Prefill) else spec[0]
