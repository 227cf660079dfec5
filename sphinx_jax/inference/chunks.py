"""Building a prefill chunk: the arrays of one call, from the sequences that the scheduler picked."""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from sphinx_jax.inference.bucketing import bucket
from sphinx_jax.inference.data_parallel import assign
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.sampling import GREEDY, SamplingArrays
from sphinx_jax.inference.sequence import Sequence
from sphinx_jax.inference.steps import Chunk, State
from sphinx_jax.inference.stop_strings import EOS_ONLY, FIRST


class Pick(NamedTuple):
    """One sequence of a chunk: its next `length` tokens go into its slot."""

    sequence: Sequence
    length: int
    source: int | None = None
    """Prefix of the pool that its first positions are copied from."""
    target: int | None = None
    """Prefix of the pool that its first positions are stored in."""


def build_chunk(
    engine: Engine, state: State, picks: SequenceOf[Pick]
) -> tuple[Chunk, tuple[np.ndarray, ...] | None, list[int | None]]:
    """The chunk, the image embeddings that go with it, and which pick each of its places is (None: padding).

    All picks begin their prompt with an image in this chunk, or none does.
    """
    places = assign([pick.sequence.slot for pick in picks], engine.groups, state.num_seqs)
    batch, text = len(places), bucket(max(pick.length for pick in picks))
    params = [GREEDY if i is None else picks[i].sequence.request.params for i in places]
    chunk = Chunk(
        slot=np.full(batch, state.num_seqs, np.int32),
        tokens=np.zeros((batch, text), np.int32),
        length=np.ones(batch, np.int32),
        # Padding starts where the first pick does: a chunk that is every prompt's first stays one.
        start=np.full(batch, _start(engine, picks[0].sequence), np.int32),
        source=np.full(batch, state.num_prefixes, np.int32),
        target=np.full(batch, state.num_prefixes, np.int32),
        last=np.zeros(batch, bool),
        limit=np.ones(batch, np.int32),
        stop=np.full(batch, FIRST, np.int32),
        seeds=np.zeros((batch, 2), np.uint32),
        seen=np.zeros((batch, engine.config.language.padded_vocab_size), bool),
        sampling=SamplingArrays.of(params),
    )
    for place, i in enumerate(places):
        if i is None:
            continue
        sequence, length, source, target = picks[i]
        first, request = sequence.prefilled, sequence.request
        chunk.slot[place] = sequence.slot
        chunk.tokens[place, :length] = sequence.prompt[first : first + length]
        chunk.length[place] = length
        chunk.start[place] = _start(engine, sequence)
        if source is not None:
            chunk.source[place] = source
        if target is not None:
            chunk.target[place] = target
        chunk.last[place] = first + length == len(sequence.prompt)
        chunk.limit[place] = min(request.params.max_new_tokens, engine.max_model_len - engine.prompt_len(request))
        chunk.stop[place] = EOS_ONLY if request.raw else FIRST
        chunk.seeds[place] = request.seeds()
        if request.params.repetition_penalty != 1:
            chunk.seen[place, sequence.prompt] = True
    embeds = None
    if picks[0].sequence.request.image and not picks[0].sequence.prefilled:
        encoded = engine.encode([pick.sequence.request.image for pick in picks])
        embeds = tuple(encoded[i or 0] for i in places)
    return chunk, embeds, places


def _start(engine: Engine, sequence: Sequence) -> int:
    """Positions of the KV cache before the next token of the prompt."""
    if not sequence.prefilled:
        return 0
    return sequence.prefilled + (engine.config.num_image_tokens if sequence.request.image else 0)
