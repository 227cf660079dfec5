"""Programs compiled at the start are all there ever are: 1,000 random requests of every kind compile none."""

import jax
import numpy as np
import pytest

from sphinx_jax.config import preset
from sphinx_jax.inference import warmup
from sphinx_jax.inference.bucketing import SERVER_CHUNKS
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import Scheduler

SHAPE = StateShape(num_seqs=4, cache_len=768, num_prefixes=4, prefix_len=64)
LONGEST = 280


def draw(model, images, random) -> Request:
    """A request of any kind; one in four begins as others do."""
    length = int(np.exp(random.uniform(0, np.log(LONGEST))))
    tokens = random.integers(3, model.tokenizer.vocab_size, length)
    if random.random() < 0.25:
        tokens[: length // 2] = np.arange(3, 3 + length // 2) % model.tokenizer.vocab_size
    params = SamplingParams(
        max_new_tokens=int(random.integers(1, 12)),
        temperature=float(random.choice([0, 0.7])),
        top_p=float(random.choice([0.5, 1])),
        top_k=int(random.choice([0, 5])),
        repetition_penalty=float(random.choice([1, 1.3])),
        seed=int(random.integers(100)),
        stop=tuple(random.choice(["a", "e", "is", "the"], random.integers(3), replace=False)),
        top_logprobs=int(random.choice([0, 0, 20])),
    )
    image = images[random.integers(len(images))] if random.random() < 0.5 else None
    return Request(tokens.tolist(), image, params, raw=bool(random.random() < 0.2))


@pytest.mark.slow
def test_a_thousand_requests_compile_nothing(make_model, monkeypatch):
    model, random = make_model(LONGEST + 40), np.random.default_rng(0)
    engine = model.engine
    monkeypatch.setattr(engine, "prefill_tokens", 128)
    images = [model.prepare_image(pixels) for pixels in random.integers(0, 256, (12, 32, 32, 3), np.uint8)]
    progress = []
    warmup.compile_all(engine, SHAPE, on_progress=lambda done, total: progress.append((done, total)))
    expected = warmup.programs(engine, SHAPE, SERVER_CHUNKS)
    total = len(expected) + 1
    assert progress == [(done, total) for done in range(1, total + 1)]
    assert engine.compilations == total == len({*expected}) + 1

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "backend_compile" in event else None
    )
    used = set()
    original = engine._run
    monkeypatch.setattr(engine, "_run", lambda key, *args: used.add(key) or original(key, *args))
    scheduler = Scheduler(engine, SHAPE, SERVER_CHUNKS)
    left, sequences = 1000, []
    while left or scheduler.has_work:
        for _ in range(min(left, int(random.integers(0, 8)))):
            sequences.append(scheduler.submit(draw(model, images, random), streams=bool(random.random() < 0.3)))
            left -= 1
        scheduler.step()
        if random.random() < 0.05:
            engine.forget_images()
        if random.random() < 0.05 and sequences:
            scheduler.cancel(sequences[random.integers(len(sequences))])
    assert len(sequences) == 1000 and all(s.finish in ("stop", "length", "cancelled") for s in sequences)
    assert scheduler.tokens_reused
    assert engine.compilations == total and not compiled
    # None is compiled for nothing.
    assert len(used) == total


def test_the_longest_prompts_fit(model, images):
    """A scheduler whose cache is `cache_len_of_all` takes every prompt that the engine takes."""
    engine = model.engine
    shape = StateShape(1, engine.cache_len_of_all(SERVER_CHUNKS.lengths))
    scheduler = Scheduler(engine, shape, SERVER_CHUNKS)
    for image, image_len in ((None, 0), (model.prepare_image(images[0]), model.config.num_image_tokens)):
        for length in range(1, engine.max_model_len - image_len):
            sequence = scheduler.submit(Request([5] * length, image, SamplingParams(max_new_tokens=1)))
            scheduler.cancel(sequence)
    assert shape.cache_len >= engine.max_model_len


@pytest.mark.parametrize(("name", "number"), [("nano", 37), ("mixtral-140m", 26), ("sphinx-moe", 36)])
def test_how_many_there_are(name, number, model, monkeypatch):
    """Of a server with 16 sequences of 4,096 positions, on a GPU that prefills 2,048 tokens at a time."""
    engine = model.engine
    monkeypatch.setattr(engine, "config", preset(name))
    monkeypatch.setattr(engine, "prefill_tokens", 2048)
    monkeypatch.setattr(engine, "kv_slice_cost", 1)
    monkeypatch.setattr(engine, "max_model_len", 4096)
    assert len(warmup.programs(engine, StateShape(16, 4096), SERVER_CHUNKS)) + 1 == number
