"""Names of the engine's programs by their shapes, and their compilation by several threads; nothing is run."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np

from sphinx_jax.inference import steps
from sphinx_jax.inference.chunks import empty_chunk
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.programs import StateShape

COMPILE_THREADS = 2
"""Programs that are compiled at a time: XLA releases Python's lock, and is mostly single-threaded."""


class Encode(NamedTuple):
    """The vision encoders on so many images."""

    num_images: int


class Prefill(NamedTuple):
    """A chunk of so many prompts, padded to `length` tokens after an image or none. `start`: tokens before it."""

    batch: int
    length: int
    has_image: bool
    start: int


class Decode(NamedTuple):
    """Decode steps that read so many cache positions."""

    kv_len: int


ProgramSpec = Encode | Prefill | Decode


def compile_specs(
    engine: Engine,
    shape: StateShape,
    specs: Sequence[ProgramSpec],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compile programs for a state of `shape`, and the one that makes it.

    `on_progress` is called in this thread with the number of programs that are compiled and their total.
    """
    state = engine.abstract_state(shape)
    on_progress(1, len(specs) + 1)
    # Made once, not by each thread.
    assert engine.stops is not None
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        started = [pool.submit(_compile_spec, engine, state, spec) for spec in specs]
        for done, future in enumerate(as_completed(started), start=2):
            future.result()
            on_progress(done, len(specs) + 1)


def _compile_spec(engine: Engine, state: steps.State, spec: ProgramSpec) -> None:
    """Compile one program for an abstract state."""
    if isinstance(spec, Encode):
        engine.compile_encoders(spec.num_images)
    elif isinstance(spec, Prefill):
        chunk = empty_chunk(engine, state, spec.batch, spec.length, spec.start)
        embeds = engine.abstract_embeds(spec.batch) if spec.has_image else None
        engine.prefill(state, chunk, embeds, False)
    else:
        engine.decode(state, np.zeros(state.num_seqs, bool), 1, 0, spec.kv_len, False)
