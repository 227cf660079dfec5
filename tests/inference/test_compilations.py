"""The set of programs is fixed: 1,000 random requests of every kind compile none beyond what their buckets leave."""

import jax
import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax.inference import warmup
from sphinx_jax.inference.bucketing import BATCHES, FILE_CHUNKS, bucket
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import Scheduler

NUM_SEQS, LONGEST, ANSWER, CACHE_LEN = 4, 30, 12, 64
"""So short that few shapes are possible: each takes a second to compile."""


@pytest.mark.slow
def test_a_thousand_mixed_requests():
    model = sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=CACHE_LEN)
    engine, random = model.engine, np.random.default_rng(0)
    images = [model.prepare_image(pixels) for pixels in random.integers(0, 256, (6, 64, 64, 3), np.uint8)]
    scheduler = Scheduler(engine, StateShape(NUM_SEQS, CACHE_LEN, 4, CACHE_LEN))

    def draw() -> Request:
        tokens = random.integers(3, model.tokenizer.vocab_size, random.integers(2, LONGEST + 1)).tolist()
        params = SamplingParams(
            max_new_tokens=int(random.integers(1, ANSWER)),
            temperature=float(random.choice([0, 0.7])),
            repetition_penalty=float(random.choice([1, 1.3])),
            seed=int(random.integers(100)),
            stop=tuple(random.choice(["a", "e", "is", "the"], random.integers(3), replace=False)),
            top_logprobs=int(random.choice([0, 0, 3])),
        )
        return Request(tokens, images[random.integers(len(images))] if random.random() < 0.5 else None, params)

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "backend_compile" in event else None
    )

    def serve(count: int) -> None:
        left, sequences = count, []
        while left or scheduler.has_work:
            for _ in range(min(left, int(random.integers(0, 8)))):
                sequences.append(scheduler.submit(draw(), streams=bool(random.random() < 0.3)))
                left -= 1
            scheduler.step()
            if random.random() < 0.05 and sequences:
                scheduler.cancel(sequences[random.integers(len(sequences))])
        assert all(sequence.finish is not None for sequence in sequences)

    serve(300)
    most = 1 + len(warmup.programs(engine, scheduler.shape, FILE_CHUNKS))
    texts = {bucket(n) for n in range(1, CACHE_LEN)}
    batches = [size for size in BATCHES if size <= NUM_SEQS]
    # A state; decode steps; a prompt's first chunk with an image and without, and a later one; and the encoders, at 1,
    # 2 and 4 images.
    assert most <= 1 + 1 + 3 * len(texts) * len(batches) + 3
    assert engine.compilations <= most
    # Warm now: 1,000 more compile next to nothing, and what they do was possible before.
    before = engine.compilations
    serve(1000)
    assert engine.compilations <= most and engine.compilations - before <= 2
    assert engine.compilations <= len(compiled) <= most
