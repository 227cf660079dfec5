"""Thin users of the scheduler: many requests to their ends, or one whose text is streamed."""

import functools
from collections.abc import Iterable, Iterator

from sphinx_jax.errors import UserError
from sphinx_jax.inference.bucketing import BATCHES, FILE_CHUNKS, bucket, kv_bucket, power_of_two
from sphinx_jax.inference.capacity import MOST_ON_GPU, NumSeqs, num_seqs
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.program_specs import Decode, compile_specs
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.rehearsal import rehearse
from sphinx_jax.inference.requests import Completion, Request
from sphinx_jax.inference.scheduler import Scheduler

MAX_NUM_SEQS = 64
"""Sequences that decode at the same time, unless the user sets another number; the KV cache grows with it."""

AHEAD = 8
"""Chunks of requests that wait while others run."""

MAX_PREFIXES = 64
"""Prefixes kept in the pool, unless the user sets the pool's bytes."""

AGAIN = "start the program again, with all its processes"
"""What helps after an error of the device, most often that another process is gone."""


def state_shape(
    engine: Engine, num_seqs: int, cache_len: int, prefix_bytes: int | None = None, prefixes: bool = True
) -> StateShape:
    """Sizes of a state for `num_seqs` sequences of `cache_len` positions and a pool of prefixes of so many bytes on
    each device. Default: a prefix for each sequence, up to MAX_PREFIXES.
    """
    num_seqs, prefix_len = engine.round_up(num_seqs), engine.prefix_len(cache_len)
    if not prefixes or prefix_bytes == 0:
        return StateShape(num_seqs, cache_len)
    count = min(num_seqs, MAX_PREFIXES) if prefix_bytes is None else prefix_bytes // engine.cache_bytes(prefix_len)
    if count < 1:
        return StateShape(num_seqs, cache_len)
    return StateShape(num_seqs, cache_len, engine.round_up(count), prefix_len)


def run(
    engine: Engine,
    requests: Iterable[Request],
    max_num_seqs: NumSeqs = MAX_NUM_SEQS,
    prefix_bytes: int | None = None,
) -> Iterator[tuple[int, Completion]]:
    """(index of the request, its completion), in the order in which they end.

    `max_num_seqs` sequences run at a time, or a few more, as many for each data-parallel group; "auto": as many as the
    devices have memory for. Requests are taken from the iterable as slots become free. The KV cache is as long as the
    requests looked ahead at need; one that needs more waits until all slots are free. Raises UserError on a request
    that does not fit.
    """
    most = MOST_ON_GPU if max_num_seqs == "auto" else max_num_seqs
    # So many that the prompts whose images are new fill a chunk, where several ask about one.
    look_ahead = most + AHEAD * BATCHES[-1] * engine.groups
    source = enumerate(requests)
    index_of, held, scheduler = {}, [], None
    while True:
        # Submitted are requests in their order: one that does not fit holds up those behind it.
        submitted = scheduler.num_waiting if scheduler else 0
        while len(held) + submitted < look_ahead and (item := next(source, None)) is not None:
            held.append(item)
        if scheduler is None or not scheduler.has_work:
            if not held:
                return
            cache_len = bucket(max(engine.positions_needed(request) for _, request in held))
            if scheduler is None or engine.positions_needed(held[0][1]) > scheduler.shape.cache_len:
                # The old state's memory is free before the new one's is taken.
                scheduler = None
                shape_of = functools.partial(
                    state_shape, engine, cache_len=cache_len, prefix_bytes=prefix_bytes, prefixes=len(held) > 1
                )
                number = min(num_seqs(engine, max_num_seqs, shape_of, FILE_CHUNKS), power_of_two(len(held)))
                scheduler = Scheduler(engine, shape_of(number))
        while held and engine.positions_needed(held[0][1]) <= scheduler.shape.cache_len:
            index, request = held.pop(0)
            index_of[scheduler.submit(request)] = index
        for sequence in scheduler.step():
            if sequence.finish == "error":
                raise UserError(f"request {index_of[sequence]}: {sequence.error}; {AGAIN}")
            if sequence.finish is not None:
                yield index_of.pop(sequence), sequence.completion


def run_all(
    engine: Engine,
    requests: Iterable[Request],
    max_num_seqs: NumSeqs = MAX_NUM_SEQS,
    prefix_bytes: int | None = None,
) -> list[Completion]:
    """The completions, in the order of the requests."""
    completions = dict(run(engine, requests, max_num_seqs, prefix_bytes))
    return [completions[i] for i in range(len(completions))]


def stream(scheduler: Scheduler, request: Request) -> Iterator[str]:
    """The text of one request as it becomes certain. Closed early, or interrupted, it is cancelled.

    Raises UserError if the request does not fit, or the device fails.
    """
    sequence = scheduler.submit(request, streams=True)
    try:
        while sequence.finish is None:
            scheduler.step()
            if text := sequence.take_text():
                yield text
    finally:
        scheduler.cancel(sequence)
    if sequence.finish == "error":
        raise UserError(f"{sequence.error}; {AGAIN}")


def stream_alone(engine: Engine, request: Request) -> Iterator[str]:
    """`stream` with a scheduler of its own, whose KV cache is as long as the request needs."""
    return stream(Scheduler(engine, StateShape(engine.round_up(1), bucket(engine.positions_needed(request)))), request)


def compile_alone(engine: Engine, request: Request) -> None:
    """Compile what `stream_alone` runs for `request`, and run nothing: the engine's parameters are abstract."""
    shape = StateShape(engine.round_up(1), bucket(engine.positions_needed(request)))
    prompt_len = engine.prompt_len(request)
    longest = min(prompt_len + request.params.max_new_tokens, engine.max_model_len)
    kv_lens = {kv_bucket(n, shape.cache_len, engine.kv_slice_cost) for n in range(prompt_len + 1, longest + 1)}
    specs = [*rehearse(engine, shape, [request]), *map(Decode, sorted(kv_lens))]
    compile_specs(engine, shape, list(dict.fromkeys(specs)))
