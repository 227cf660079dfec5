"""Building a prefill chunk: the arrays of one call, from the sequences that the scheduler picked."""

from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import numpy as np

from sphinx_jax.inference.bucketing import FILE_CHUNKS, ChunkSizes, batch_sizes, bucket
from sphinx_jax.inference.data_parallel import assign
from sphinx_jax.inference.engine import Engine, ImageEmbeds
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import GREEDY, SamplingArrays
from sphinx_jax.inference.sequence import Sequence
from sphinx_jax.inference.steps import Chunk, State
from sphinx_jax.inference.stop_strings import EOS_ONLY, FIRST, NEVER


class Pick(NamedTuple):
    """One sequence of a chunk: its next `length` tokens go into its slot."""

    sequence: Sequence
    length: int
    source: int | None = None
    """Prefix of the pool that its first positions are copied from."""
    target: int | None = None
    """Prefix of the pool that its first positions are stored in."""


def build_chunk(
    engine: Engine, state: State, picks: SequenceOf[Pick], sizes: ChunkSizes = FILE_CHUNKS
) -> tuple[Chunk, tuple[ImageEmbeds, ...] | None, list[int | None]]:
    """The chunk, the image embeddings that go with it, and which pick each of its places is (None: padding).

    All picks begin their prompt with an image in this chunk, or none does.
    """
    text = bucket(max(pick.length for pick in picks), sizes.lengths)
    with_image = picks[0].sequence.request.image is not None and not picks[0].sequence.prefilled
    num_image_tokens = engine.config.num_image_tokens * with_image
    batches = batch_sizes(text, num_image_tokens, sizes, engine.groups, state.num_seqs)
    places = assign([pick.sequence.slot for pick in picks], engine.groups, state.num_seqs, batches)
    # Padding starts where the first pick does: a chunk that is every prompt's first stays one.
    chunk = empty_chunk(engine, state, len(places), text, _start(engine, picks[0].sequence))
    params = [GREEDY if i is None else picks[i].sequence.request.params for i in places]
    adapters = [None if i is None else picks[i].sequence.request.adapter for i in places]
    fields: dict[str, Any] = chunk._asdict() | {
        "sampling": SamplingArrays.of(params),
        "rank_mask": engine.rank_masks(adapters),
    }
    for place, i in enumerate(places):
        if i is None:
            continue
        sequence, length, source, target = picks[i]
        first, request = sequence.prefilled, sequence.request
        fields["slot"][place] = sequence.slot
        fields["tokens"][place, :length] = sequence.prompt[first : first + length]
        fields["length"][place] = length
        fields["start"][place] = _start(engine, sequence)
        if source is not None:
            fields["source"][place] = source
        if target is not None:
            fields["target"][place] = target
        fields["last"][place] = first + length == len(sequence.prompt)
        fields["limit"][place] = min(request.params.max_new_tokens, engine.max_model_len - engine.prompt_len(request))
        fields["stop"][place] = _first_stop_state(request)
        fields["seeds"][place] = request.seeds()
        if request.params.repetition_penalty != 1:
            fields["seen"][place, sequence.prompt] = True
    embeds = None
    if with_image:
        images = [pick.sequence.request.image for pick in picks]
        sizes_of_all = [size * engine.groups for size in batches]
        encoded = engine.encode([image for image in images if image is not None], sizes_of_all)
        embeds = tuple(encoded[i or 0] for i in places)
    return Chunk(**fields), embeds, places


def _first_stop_state(request: Request) -> int:
    if request.params.ignore_eos:
        return NEVER
    return EOS_ONLY if request.raw else FIRST


def empty_chunk(engine: Engine, state: State, batch: int, text: int, start: int) -> Chunk:
    """A chunk of padding alone, after `start` cache positions: numpy's arrays, which are the device's once the program
    is called.
    """
    fields: dict[str, Any] = {
        "slot": np.full(batch, state.num_seqs, np.int32),
        "tokens": np.zeros((batch, text), np.int32),
        "length": np.ones(batch, np.int32),
        "start": np.full(batch, start, np.int32),
        "source": np.full(batch, state.num_prefixes, np.int32),
        "target": np.full(batch, state.num_prefixes, np.int32),
        "last": np.zeros(batch, bool),
        "limit": np.ones(batch, np.int32),
        "stop": np.full(batch, FIRST, np.int32),
        "seeds": np.zeros((batch, 2), np.uint32),
        "seen": np.zeros((batch, engine.config.language.padded_vocab_size), bool),
        "sampling": SamplingArrays.of([GREEDY] * batch),
        "rank_mask": engine.rank_masks([None] * batch),
    }
    return Chunk(**fields)


def _start(engine: Engine, sequence: Sequence) -> int:
    """Positions of the KV cache before the next token of the prompt."""
    if not sequence.prefilled:
        return 0
    return sequence.prefilled + (engine.config.num_image_tokens if sequence.request.image else 0)
