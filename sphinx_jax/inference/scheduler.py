"""The one loop under all inference: requests come and go, prompts are prefilled in chunks between decode steps.

    scheduler.submit(request) -> sequence       scheduler.step() -> sequences with something new       cancel(sequence)

A sequence waits, is prefilled into a free batch slot, decodes, and ends in exactly one terminal event (`finish`). One
thread owns the scheduler. In several processes each runs the same scheduler on the same calls: nothing here depends on
clocks there.
"""

import collections
import logging
import threading
import time
from collections.abc import Collection, Iterable

import jax
import numpy as np

from sphinx_jax.errors import UserError
from sphinx_jax.inference.bucketing import (
    BATCHES,
    FILE_CHUNKS,
    INTERACTIVE_BUDGET,
    LENGTHS,
    ChunkSizes,
    batch_bucket,
    bucket,
    kv_bucket,
    padded_len,
    prompts_per_chunk,
)
from sphinx_jax.inference.chunks import Pick, build_chunk
from sphinx_jax.inference.data_parallel import group_of
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.prefix_cache import NOTHING_CACHED, CachedTokens, PrefixCache
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.requests import Request, TopLogprobs
from sphinx_jax.inference.sequence import NO_SLOT, Sequence
from sphinx_jax.inference.steps import MAX_STEPS, Sampled, State

log = logging.getLogger(__name__)

STREAM_SECONDS = 0.05
"""Between two deliveries of tokens to a sequence that streams."""

LOCKSTEP_STEPS = 4
"""Decode steps of a call while sequences stream, in several processes: their clocks differ, the number must not."""

MIN_REUSED = 8
"""Positions that are worth copying: fewer are prefilled again."""

MIN_SHARED = 128
"""Positions in common with a prompt that is being prefilled that are worth waiting for."""


class Scheduler:
    """Serves requests over `shape.num_seqs` batch slots. Only the thread that first calls `step` may call it."""

    def __init__(self, engine: Engine, shape: StateShape, chunks: ChunkSizes = FILE_CHUNKS):
        self._engine, self.shape, self._chunks = engine, shape, chunks
        self._owner: int | None = None
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._step_seconds: float | None = None
        self.tokens_prefilled = 0
        """Positions computed by prefill so far, image tokens included."""
        self.tokens_reused = 0
        """Positions of prompts that were in the KV cache already."""
        self._reset()

    def _reset(self) -> None:
        """No state on the device, and nothing cached."""
        shape = self.shape
        self._state: State | None = None
        self._running: dict[int, Sequence] = {}
        self._prefilling: dict[int, Sequence] = {}
        self._cached = [NOTHING_CACHED] * shape.num_seqs
        self._freed = collections.OrderedDict.fromkeys(range(shape.num_seqs))
        self._cancelled: set[int] = set()
        self._prefixes = PrefixCache(shape.num_prefixes, self._engine.groups)

    # Requests

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that have a batch slot."""
        return len(self._running) + len(self._prefilling)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._prefilling)

    def submit(self, request: Request, *, streams: bool = False) -> Sequence:
        """Queue a request. `streams`: its tokens are wanted as they come.

        Raises UserError if it can never be served; nothing else is affected then.
        """
        self._check_owner()
        self._engine.rank_masks([request.adapter])  # raises UserError on an unknown one
        needed = self._engine.positions_needed(request, self._chunks.lengths)
        if needed > self.shape.cache_len:
            raise UserError(
                f"the prompt and its answer need {needed} cache positions and a sequence has {self.shape.cache_len}: "
                "shorten the prompt or ask for fewer tokens"
            )
        sequence = Sequence(request, self._engine.tokenizer, streams)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now; its slot is free for the next chunk. Nothing happens to one that has ended."""
        self._check_owner()
        if sequence.finish is not None:
            return
        sequence.end("cancelled")
        if sequence.slot == NO_SLOT:
            self._waiting.remove(sequence)
        else:
            self._free(sequence)

    def allocate(self) -> None:
        """Make the state on the device, if there is none. Raises UserError if it does not fit into memory."""
        self._check_owner()
        if self._state is None:
            self._state = self._engine.new_state(self.shape)

    def step(self) -> list[Sequence]:
        """One round: prefill, then decode. The sequences that have new tokens or have ended.

        While something streams, a round prefills `_interactive_budget` tokens at most and decodes a few steps; else
        it fills all free slots first. An error of the device ends every sequence that has a slot; requests that wait
        are served afterwards.
        """
        self._check_owner()
        changed: list[Sequence] = []
        try:
            self.allocate()
            spent = 0
            while picks := self._pick(spent):
                spent += self._cost(picks)
                changed += self._prefill(picks)
            if self._running:
                changed += self._decode()
        except jax.errors.JaxRuntimeError as error:
            log.exception("the device failed; its sequences end")
            changed += self._fail(f"the device failed: {str(error).splitlines()[0]}")
        except BaseException:
            # The state was donated to a call that may not have returned it.
            self._fail("interrupted")
            raise
        return list(dict.fromkeys(changed))

    def _check_owner(self) -> None:
        """A state that is donated from call to call has one owner."""
        if self._owner is None:
            self._owner = threading.get_ident()
        assert self._owner == threading.get_ident(), "a scheduler is used by one thread"

    def _fail(self, reason: str) -> list[Sequence]:
        failed = [*self._running.values(), *self._prefilling.values()]
        for sequence in failed:
            sequence.slot = NO_SLOT
            sequence.end("error", reason)
        self._reset()
        return failed

    @property
    def _streams(self) -> bool:
        """Whether someone waits for the tokens of a sequence that has a slot."""
        return any(sequence.streams for sequence in self._active)

    @property
    def _interactive_budget(self) -> int:
        """Tokens that are prefilled between two decode calls at most, while something streams.

        One chunk of a long prompt, so that those who read stand still for no longer; more while more sequences wait
        for their first token than have one.
        """
        starting = len(self._prefilling) + min(len(self._waiting), len(self._freed))
        return (
            INTERACTIVE_BUDGET
            if starting > len(self._running)
            else min(INTERACTIVE_BUDGET, self._engine.prefill_tokens)
        )

    @property
    def _active(self) -> Iterable[Sequence]:
        yield from self._running.values()
        yield from self._prefilling.values()

    # Prefill

    def _pick(self, spent: int) -> list[Pick]:
        """The next chunk: sequences that are alike, those that have waited longest first.

        Empty: nothing to prefill, or no more in this round, of which `spent` tokens have been prefilled.
        """
        picks: list[Pick] = []
        kind, limit = None, 0
        per_group = collections.Counter()
        for sequence in list(self._prefilling.values()):
            length = min(len(sequence.prompt) - sequence.prefilled, self._engine.prefill_tokens)
            this = self._kind(sequence, sequence.prefilled, length)
            if kind is None:
                kind, limit = this, self._batch_limit(this, spent)
            group = self._group(sequence.slot)
            if this == kind and per_group[group] < limit:
                per_group[group] += 1
                picks.append(Pick(sequence, length))
        for sequence in list(self._waiting):
            if not self._freed or (kind is not None and min(per_group[g] for g in self._free_groups()) >= limit):
                break
            if self._should_wait(sequence, [pick.sequence for pick in picks]):
                continue
            groups = [g for g in self._free_groups() if kind is None or per_group[g] < limit]
            slot, reused, source = self._place(sequence, groups, per_group)
            length = min(len(sequence.prompt) - reused, self._engine.prefill_tokens)
            this = self._kind(sequence, reused, length)
            if kind is None:
                kind, limit = this, self._batch_limit(this, spent)
            if this != kind or not limit:
                continue
            per_group[self._group(slot)] += 1
            self._occupy(sequence, slot, reused)
            if source is not None:
                self._prefixes.touch(source)
            picks.append(Pick(sequence, length, source))
        return self._with_targets(picks)

    def _kind(self, sequence: Sequence, prefilled: int, length: int) -> tuple[bool, bool, int]:
        """Sequences of one kind share a chunk: (begins the prompt, with an image, length bucket)."""
        begins = prefilled == 0
        return begins, begins and sequence.request.image is not None, bucket(length, self._chunks.lengths)

    def _batch_limit(self, kind: tuple[bool, bool, int], spent: int) -> int:
        """Prompts of a chunk in each data-parallel group; 0: it would hold up what streams for more than one budget."""
        _, has_image, length = kind
        chunks, num_image_tokens = self._chunks, self._engine.config.num_image_tokens * has_image
        if self._streams:
            left = min(chunks.budget, self._interactive_budget) - spent
            if spent and left < length + num_image_tokens:
                return 0
            chunks = chunks._replace(budget=left)
        return prompts_per_chunk(length, num_image_tokens, chunks, self._engine.groups)

    def _cost(self, picks: list[Pick]) -> int:
        """Tokens of a chunk in a data-parallel group, padding and image tokens included."""
        first = picks[0]
        _, has_image, length = self._kind(first.sequence, first.sequence.prefilled, first.length)
        most = max(collections.Counter(self._group(pick.sequence.slot) for pick in picks).values())
        return batch_bucket(most) * (length + self._engine.config.num_image_tokens * has_image)

    def _group(self, slot: int) -> int:
        return group_of(slot, self._engine.groups, self.shape.num_seqs)

    def _free_groups(self) -> set[int]:
        if self._engine.groups == 1:
            return {0}
        return {self._group(slot) for slot in self._freed}

    def _should_wait(self, sequence: Sequence, picked: list[Sequence]) -> bool:
        """Whether another sequence is prefilling what this one could copy from the pool a moment later."""
        if not self.shape.num_prefixes:
            return False
        context, has_image = sequence.context, sequence.request.image is not None
        for other in (*picked, *self._prefilling.values()):
            if other.reused or other.context != context:
                continue
            common = CachedTokens(other.prompt, context).common(sequence.prompt, context)
            if common and (has_image or common >= MIN_SHARED):
                pooled = self._best(sequence, range(self._engine.groups))
                return pooled is None or 2 * pooled[0] < common
        return False

    def _best(self, sequence: Sequence, groups: Collection[int]) -> tuple[int, int] | None:
        """(tokens, place) of the best prefix in the pool for a sequence, in one of `groups`."""
        return self._prefixes.longest(sequence.prompt, sequence.context, groups)

    def _place(self, sequence: Sequence, groups: list[int], load: collections.Counter) -> tuple[int, int, int | None]:
        """(slot, tokens reused, prefix of the pool they are copied from) for a sequence, in one of `groups`."""
        slots = [slot for slot in self._freed if self._group(slot) in groups]
        common = [
            (self._cached[slot].common(sequence.prompt, sequence.context), -i, slot) for i, slot in enumerate(slots)
        ]
        in_slot, _, slot = max(common)
        pooled = self._best(sequence, groups)
        if pooled is not None and pooled[0] > in_slot:
            reused, source = pooled
            group = source * self._engine.groups // self.shape.num_prefixes
            slot = next(slot for slot in slots if self._group(slot) == group)
        else:
            reused, source = in_slot, None
        reused = self._usable(sequence, reused)
        if not reused:
            # The group with the fewest picks, and there the slot that was freed first.
            slot, source = min(slots, key=lambda slot: load[self._group(slot)]), None
        return slot, reused, source

    def _usable(self, sequence: Sequence, reused: int) -> int:
        """How many of `reused` tokens to start after: the last token is always computed, and the padded rest fits."""
        prompt, offset = len(sequence.prompt), self._image_len(sequence)
        reused = min(reused, prompt - 1)
        # A chunk is written from its start on: its padding must not reach past the cache.
        while reused > 0 and (offset + reused + self._padded_len(prompt - reused) > self.shape.cache_len):
            reused -= LENGTHS[0]
        return reused if reused > 0 and reused + offset >= MIN_REUSED else 0

    def _padded_len(self, num_tokens: int) -> int:
        return padded_len(num_tokens, self._engine.prefill_tokens, self._chunks.lengths)

    def _image_len(self, sequence: Sequence) -> int:
        return self._engine.config.num_image_tokens if sequence.request.image else 0

    def _with_targets(self, picks: list[Pick]) -> list[Pick]:
        """The picks, those whose prefix is worth keeping with a place in the pool.

        Only now is the pool's index changed: no pick of this chunk may copy what the chunk itself stores.
        """
        targets: dict[int, int] = {}
        for i, (sequence, length, *_) in enumerate(picks):
            image_len = self._image_len(sequence)
            ends = sequence.prefilled + length == len(sequence.prompt)
            worth = image_len > 0 or len(sequence.prompt) >= MIN_SHARED
            if self.shape.num_prefixes and ends and worth and not sequence.reused:
                kept = sequence.prompt[: max(self.shape.prefix_len - image_len, 0)]
                place = self._prefixes.store(kept, sequence.context, self._group(sequence.slot))
                # With more picks than places one is stored over another: only the last of them is written.
                targets[place] = i
        places = {i: place for place, i in targets.items()}
        return [pick._replace(target=places.get(i)) for i, pick in enumerate(picks)]

    def _occupy(self, sequence: Sequence, slot: int, reused: int) -> None:
        self._waiting.remove(sequence)
        del self._freed[slot]
        self._cancelled.discard(slot)
        sequence.slot, sequence.prefilled, sequence.reused = slot, reused, reused
        self._prefilling[slot] = sequence
        self._cached[slot] = NOTHING_CACHED
        if reused:
            self.tokens_reused += reused + self._image_len(sequence)

    def _prefill(self, picks: list[Pick]) -> list[Sequence]:
        """Run a chunk; the sequences whose prompts end in it, with their first token."""
        engine = self._engine
        assert self._state is not None
        chunk, embeds, places = build_chunk(engine, self._state, picks, self._chunks)
        wants_top = any(pick.sequence.request.params.top_logprobs for pick in picks)
        self._state, sampled = engine.prefill(self._state, chunk, embeds, wants_top)
        self.tokens_prefilled += sum(pick.length for pick in picks)
        if embeds is not None:
            self.tokens_prefilled += engine.config.num_image_tokens * len(picks)
        for pick in picks:
            pick.sequence.prefilled += pick.length
        ended = [i is not None and picks[i].sequence.prefilled == len(picks[i].sequence.prompt) for i in places]
        if not any(ended):
            return []
        sampled = jax.device_get(sampled)
        changed = []
        for place, i in enumerate(places):
            if i is not None and ended[place]:
                sequence = picks[i].sequence
                self._running[sequence.slot] = self._prefilling.pop(sequence.slot)
                self._deliver(sequence, place, sampled, 1)
                changed.append(sequence)
        return changed

    # Decode

    def _decode(self) -> list[Sequence]:
        """Some decode steps of all running sequences; those with new tokens."""
        num_steps = self._num_steps()
        # With requests waiting it pays to stop once a chunk's worth of slots is free, and not before.
        chunk = min(BATCHES[-1] * self._engine.groups, max(1, self.shape.num_seqs // 4))
        until = max(0, len(self._running) - chunk) if self._waiting else 0
        longest = max(self._cache_filled(sequence) for sequence in self._running.values())
        kv_len = kv_bucket(longest + num_steps, self.shape.cache_len, self._engine.kv_slice_cost)
        cancelled = np.zeros(self.shape.num_seqs, bool)
        cancelled[list(self._cancelled)] = True
        self._cancelled.clear()
        wants_top = any(sequence.request.params.top_logprobs for sequence in self._running.values())
        start = time.perf_counter()
        assert self._state is not None
        self._state, sampled = self._engine.decode(self._state, cancelled, num_steps, until, kv_len, wants_top)
        sampled = jax.device_get(sampled)
        changed = []
        before = {slot: len(sequence.tokens) for slot, sequence in self._running.items()}
        most = 1
        for slot, sequence in list(self._running.items()):
            new = int(sampled.count[slot]) - before[slot]
            most = max(most, new)
            self._deliver(sequence, slot, sampled, new)
            changed.append(sequence)
        self._step_seconds = (time.perf_counter() - start) / most
        return changed

    def _num_steps(self) -> int:
        """Decode steps of the next call: as many as fit between two deliveries if something streams, else MAX_STEPS."""
        if not self._streams:
            return MAX_STEPS
        if jax.process_count() > 1:
            return LOCKSTEP_STEPS
        if self._step_seconds is None or any(len(s.tokens) == 1 for s in self._running.values() if s.streams):
            return 1
        return int(min(max(STREAM_SECONDS / max(self._step_seconds, 1e-9), 1), MAX_STEPS))

    def _cache_filled(self, sequence: Sequence) -> int:
        """Positions of its slot that are filled: the token sampled last is not among them."""
        return len(sequence.prompt) + self._image_len(sequence) + max(len(sequence.tokens) - 1, 0)

    def _deliver(self, sequence: Sequence, row: int, sampled: Sampled, count: int) -> None:
        """Give a sequence the first `count` tokens of a row; end it if the device or a stop string ended it."""
        top = []
        if number := sequence.request.params.top_logprobs:
            columns = zip(sampled.top_tokens[row, :count], sampled.top_logprobs[row, :count], strict=True)
            top = [TopLogprobs(ids[:number].tolist(), values[:number].tolist()) for ids, values in columns]
        sequence.append(sampled.tokens[row, :count].tolist(), sampled.logprobs[row, :count].tolist(), top)
        if sequence.finish is None and sampled.done[row]:
            sequence.end("stop" if sampled.stopped[row] else "length")
        if sequence.finish is not None:
            self._free(sequence, running=not sampled.done[row])

    def _free(self, sequence: Sequence, running: bool = True) -> None:
        """Give a slot back; what it holds may be reused. `running`: the device does not know yet that it has ended."""
        slot = sequence.slot
        self._running.pop(slot, None)
        self._prefilling.pop(slot, None)
        if running:
            self._cancelled.add(slot)
        filled = sequence.prompt[: sequence.prefilled]
        if sequence.prefilled == len(sequence.prompt):
            filled = np.concatenate([filled, np.asarray(sequence.tokens[:-1], np.int32)])
        self._cached[slot] = CachedTokens(filled, sequence.context)
        self._freed[slot] = None
        sequence.slot = NO_SLOT
