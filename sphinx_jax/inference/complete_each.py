"""Items to completions: requests are made ahead by threads of the primary process, and all processes answer them."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sharding import broadcast_each_from_primary
from sphinx_jax.errors import UserError
from sphinx_jax.inference import generate
from sphinx_jax.inference.capacity import NumSeqs
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.requests import Completion, Request

AHEAD = 32
"""Items whose requests are made while the model works: their images are opened and resized."""

THREADS = 2

T = TypeVar("T")
Result = TypeVar("Result")


def complete_each(
    engine: Engine,
    items: Iterable[T],
    make_request: Callable[[T], Request],
    max_num_seqs: NumSeqs,
    prefix_bytes: int | None = None,
) -> Iterator[tuple[T, Completion | UserError]]:
    """(item, its completion, or why it has none), in the order in which they end.

    Of several processes the primary one calls `make_request`; the others receive items and requests, which must pickle.
    An item for which it raises UserError, or whose request does not fit, harms no other.
    """
    answering: list[T] = []
    failed: collections.deque[tuple[T, UserError]] = collections.deque()

    def prepare(item: T) -> tuple[T, Request | UserError]:
        try:
            request = make_request(item)
            engine.prompt_len(request)
        except UserError as error:
            return item, error
        return item, request

    def requests() -> Iterator[Request]:
        for item, request in broadcast_each_from_primary(_ahead(prepare, items)):
            if isinstance(request, UserError):
                failed.append((item, request))
            else:
                answering.append(item)
                yield request

    for index, completion in generate.run(engine, requests(), max_num_seqs, prefix_bytes):
        while failed:
            yield failed.popleft()
        yield answering[index], completion
    yield from failed


def _ahead(function: Callable[[T], Result], items: Iterable[T]) -> Iterator[Result]:
    """function(item) for each item in order, computed by threads a little before it is asked for."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
