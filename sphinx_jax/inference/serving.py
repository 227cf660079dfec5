"""Answering: many requests over a fixed number of rows, refilled as they end; or one, streamed."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import bucket, power_of_two
from sphinx_jax.inference.data_parallel import round_robin
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.requests import Completion, Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.stop_strings import STOPPED, TextStream, check_stops, cut

MAX_NUM_SEQS = 64
"""Requests answered at the same time, unless the user says otherwise; the cache grows with it."""

MAX_PREFILL_SEQS = 16
"""Prompts read at once at most, by each group of devices that has rows of its own; with pictures, whose words every
device has, by all of them together."""

PREFILL_BUDGET = 8192
"""Tokens of all prompts that such a group reads at once, pictures aside, at most: memory grows with them."""

STEPS = 64
"""Tokens chosen between two looks of the host at who is done, which is also how soon Ctrl-C is heard."""


def prefill_batch_size(tokens: int, piece: int, groups: int, pictures: bool) -> int:
    """How many prompts of up to so many tokens, read in pieces of `piece`, each group reads at once: a power of two."""
    most = min(MAX_PREFILL_SEQS, PREFILL_BUDGET // min(bucket(tokens), piece))
    if pictures:
        most = min(most, max(1, MAX_PREFILL_SEQS // groups))
    return 1 << (most.bit_length() - 1)


def serve(
    engine: Engine,
    requests: Iterable[Request],
    sampling: SamplingParams,
    stops: Sequence[str] = (),
    max_num_seqs: int = MAX_NUM_SEQS,
) -> Iterator[tuple[int, Completion]]:
    """(index of the request, its answer), in the order in which they end.

    `max_num_seqs` are answered at a time, or as few more as devices that share them out need to have as many each; as some end,
    others take their rows. Requests are taken from the iterable as they are needed. One that does not fit the context
    raises UserError.
    """
    stops = check_stops(stops)
    table = engine.stop_table(stops)
    queue = _Queue(engine, requests)
    state, active = None, {}
    at_once = MAX_PREFILL_SEQS * engine.groups
    while queue.fill(max_num_seqs + at_once) or active:
        if not active and (state is None or queue.cache_len_needed() > state.cache_len):
            # Only when all rows are empty can they be exchanged for longer ones.
            size, state = min(max_num_seqs, power_of_two(len(queue))), None
            state = engine.new_state(size, queue.cache_len_needed())
        free = [row for row in range(state.num_seqs) if row not in active]
        while free and (group := queue.take(free, state)):
            rows_taken, indices, prompts = zip(*group, strict=True)
            state = engine.prefill(state, rows_taken, prompts, sampling, table)
            active |= dict(zip(rows_taken, indices, strict=True))
            free = [row for row in free if row not in active]
        # With requests waiting it pays to stop once a group of rows is free, and not before.
        until = max(0, len(active) - min(at_once, max(1, state.num_seqs // 4))) if len(queue) else 0
        state = engine.decode(state, sampling, table, STEPS, until)
        ended = [row for row in np.flatnonzero(np.array(state.done)).tolist() if row in active]
        if ended:
            for row, completion in zip(ended, _completions(engine, state, ended, stops), strict=True):
                yield active.pop(row), completion


def answer_all(
    engine: Engine,
    requests: Iterable[Request],
    sampling: SamplingParams,
    stops: Sequence[str] = (),
    max_num_seqs: int = MAX_NUM_SEQS,
) -> list[Completion]:
    """The answers, in the order of the requests."""
    answers = dict(serve(engine, requests, sampling, stops, max_num_seqs))
    return [answers[i] for i in range(len(answers))]


def _completions(
    engine: Engine, state: steps.State, max_num_seqs: list[int], stops: tuple[str, ...]
) -> list[Completion]:
    count, stop, output, logprob = (np.array(x) for x in (state.count, state.stop, state.output, state.logprob))
    completions = []
    for row in max_num_seqs:
        tokens = output[row, : count[row]].tolist()
        text = cut(engine.tokenizer.decode(tokens), stops)
        finish = "stop" if stop[row] == STOPPED else "length"
        completions.append(Completion(text, tokens, logprob[row, : count[row]].tolist(), finish))
    return completions


class _Queue:
    """Requests that wait, looked at a little ahead so that like ones can be read together."""

    def __init__(self, engine: Engine, requests: Iterable[Request]):
        self._engine = engine
        self._source = enumerate(requests)
        self._waiting: list[tuple[int, Request, int]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def fill(self, count: int) -> int:
        """Look ahead to `count` requests; how many wait now."""
        while len(self._waiting) < count and (entry := next(self._source, None)) is not None:
            index, request = entry
            self._waiting.append((index, request, self._engine.cache_len_needed(request)))
        return len(self._waiting)

    def cache_len_needed(self) -> int:
        """Of the longest that waits."""
        return max(slots for *_, slots in self._waiting)

    def take(self, free: Sequence[int], state: steps.State) -> list[tuple[int, int, Request]]:
        """(row, index, request), for rows that are `free`, of such as are like the one that has waited longest.

        They have a picture or none, and the same length bucket; no more than are read at once. Empty if that one needs
        a longer cache than there is: it waits for one.
        """
        if not self._waiting or self._waiting[0][2] > state.cache_len:
            return []
        engine = self._engine
        first = self._waiting[0][1]
        each = prefill_batch_size(len(first.tokens), engine.prefill_tokens, engine.groups, first.picture is not None)
        max_num_seqs = round_robin(free, engine.groups, state.num_seqs, each)
        like = lambda entry: (entry[1].picture is None, bucket(len(entry[1].tokens)), entry[2] <= state.cache_len)
        chosen = [entry for entry in self._waiting if like(entry) == like(self._waiting[0])][: len(max_num_seqs)]
        gone = {index for index, *_ in chosen}
        self._waiting = [entry for entry in self._waiting if entry[0] not in gone]
        return [(row, index, request) for row, (index, request, _) in zip(max_num_seqs, chosen, strict=False)]


class Session:
    """One row whose cache is kept: a prompt that begins like what is there is read from where they part."""

    def __init__(self, engine: Engine, slots: int):
        self._engine, self._slots = engine, slots
        self._state: steps.State | None = None
        self._tokens: list[int] = []
        self._picture: bytes | None = None

    def stream(self, request: Request, sampling: SamplingParams, stops: Sequence[str]) -> Iterator[str]:
        """The answer, piece by piece. Ended early, by close() or Ctrl-C, the session keeps what is in the cache."""
        engine, stops = self._engine, check_stops(stops)
        engine.prompt_length(request)
        table = engine.stop_table(stops)
        picture = request.picture.digest if request.picture else None
        reuse = _common(self._tokens, request.tokens[:-1]) if picture == self._picture else 0
        # During a call the state is the device's; an interruption there makes the session begin afresh.
        state, self._state = self._state, None
        if state is None:
            state, reuse = engine.new_state(1, self._slots), 0
        self._state = engine.prefill(state, [0], [request], sampling, table, reuse)
        self._tokens, self._picture = list(request.tokens), picture
        text, said = TextStream(engine.tokenizer, stops), []
        while True:
            state = self._state
            said += np.array(state.output)[0, len(said) : int(np.array(state.count)[0])].tolist()
            # The token chosen last is not read yet.
            self._tokens = [*request.tokens, *said[:-1]]
            if piece := text.push(said):
                yield piece
            if np.array(state.done)[0]:
                break
            self._state = None
            self._state = engine.decode(state, sampling, table, 1, 0)
        if piece := text.finish():
            yield piece


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
