"""Nothing is compiled for a request's own length: 200 of all kinds, against the shapes that the buckets leave."""

import jax
import numpy as np

import sharding
import sphinx_jax
from sphinx_jax.inference.bucketing import bucket, cache_len_for, power_of_two
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.serving import Session, serve

MAX_NUM_SEQS, LONGEST, ANSWER, MAX_MODEL_LEN = 2, 70, 12, 128
"""So short that few shapes are possible: each takes a second to compile."""


def test_two_hundred_mixed_requests():
    model = sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=MAX_MODEL_LEN)
    engine, words = model.engine, model.config.num_image_tokens
    random = np.random.default_rng(0)
    pictures = [model.picture(pixels) for pixels in random.integers(0, 256, (6, 64, 64, 3), np.uint8)]

    def draw() -> Request:
        tokens = random.integers(3, model.tokenizer.vocab_size, random.integers(2, LONGEST + 1)).tolist()
        picture = pictures[random.integers(len(pictures))] if random.random() < 0.5 else None
        return Request(tokens, picture, int(random.integers(1, ANSWER)), int(random.integers(100)))

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    requests = [draw() for _ in range(160)]
    assert len(list(serve(engine, requests, SamplingParams(temperature=0.7), max_num_seqs=MAX_NUM_SEQS))) == len(
        requests
    )
    for _ in range(20):
        first, more = draw(), random.integers(3, 99, random.integers(1, 20)).tolist()
        session = Session(engine, MAX_MODEL_LEN)
        for request in (first, Request([*first.tokens, *more], first.picture, 3)):
            list(session.stream(request, SamplingParams(), ()))

    lengths = range(2, LONGEST + 1)
    texts = {bucket(n) for n in lengths}
    slots = {
        cache_len_for(n, picture, a, MAX_MODEL_LEN, 512)
        for n in lengths
        for picture in (0, words)
        for a in range(1, ANSWER)
    }
    assert texts == {64, 96} and slots == {64, 96, 128}
    batches = {power_of_two(n) for n in range(1, MAX_NUM_SEQS + 1)}
    # For each size of the cache an empty one, the decoding loop, and what reads prompts with and without a picture;
    # a chat's cache has one size, and its second turn is read behind the first; and the encoders.
    served = len(slots) * (2 + 2 * len(texts) * len(batches))
    chatted = 2 + 2 * len(texts) + len({bucket(n) for n in range(1, LONGEST + 20)})
    assert engine.compilations <= len(compiled) <= served + chatted + len(batches)
