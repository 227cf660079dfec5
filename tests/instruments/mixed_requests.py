"""Program: one of two processes that serve mixed requests, which arrive and are cancelled at random moments.

python -m tests.instruments.mixed_requests COORDINATOR PROCESS_ID OUT       the primary process writes JSON to OUT
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import sharding
import sphinx_jax
from sphinx_jax import Sphinx
from sphinx_jax.cli.startup import prepare_process
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import Scheduler
from sphinx_jax.inference.sequence import Sequence as RunningSequence

COUNT, NEW = 200, 12
PROMPTS = ["what is the colour of the shape?", "is there a circle?", "is it red or is it blue?", "why?"]
SHAPE = StateShape(num_seqs=4, cache_len=128, num_prefixes=4, prefix_len=64)


def mixed_requests(model: Sphinx, images: Sequence[np.ndarray], count: int, seed: int = 0) -> Iterator[Request]:
    """Greedy and sampled, with stop strings, log-probabilities, repetition penalty, images and none."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        params = SamplingParams(
            max_new_tokens=int(random.integers(1, NEW)),
            temperature=float(random.choice([0, 0, 0.7, 1.3])),
            top_p=float(random.choice([0.5, 0.95, 1])),
            top_k=int(random.choice([0, 0, 5])),
            repetition_penalty=float(random.choice([1, 1, 1.5])),
            seed=int(random.integers(100)),
            stop=tuple(random.choice(["e", "a", "is", "ab", "the "], random.integers(3), replace=False)),
            top_logprobs=int(random.choice([0, 0, 3])),
        )
        image = images[int(random.integers(len(images)))] if random.random() < 0.6 else None
        yield model.request(PROMPTS[int(random.integers(4))], image, params, raw=bool(random.random() < 0.2))


def serve_at_random(
    scheduler: Scheduler, requests: Sequence[Request], seed: int
) -> tuple[list[RunningSequence], set[RunningSequence], dict[RunningSequence, int]]:
    """The sequences of `requests`, which of them were cancelled, and how many terminal events each had."""
    random, waiting = np.random.default_rng(seed), list(requests)
    sequences, cancelled, events = [], set(), {}
    while waiting or scheduler.has_work:
        for _ in range(min(random.integers(0, 6), len(waiting))):
            sequences.append(scheduler.submit(waiting.pop(), streams=bool(random.random() < 0.5)))
        for sequence in scheduler.step():
            events[sequence] = events.get(sequence, 0) + (sequence.finish is not None)
        running = [s for s in sequences if s.finish is None]
        if running and random.random() < 0.15:
            sequence = running[int(random.integers(len(running)))]
            scheduler.cancel(sequence)
            cancelled.add(sequence)
    return sequences, cancelled, events


def some_images() -> list[np.ndarray]:
    """Three images of 64 x 64."""
    return list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))


def main(coordinator: str, process_id: str, out: str) -> None:
    sharding.start_processes(sharding.Processes(coordinator, 2, int(process_id)))
    sharding.simulate_devices(2)
    model = sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(data=2, tensor=2), "float32", max_model_len=128)
    requests = list(mixed_requests(model, some_images(), COUNT))
    scheduler = Scheduler(model.engine, SHAPE)
    sequences, cancelled, events = serve_at_random(scheduler, requests, seed=3)
    assert all(events[s] == 1 for s in sequences if s not in cancelled)
    said = [[s.text, s.tokens, s.finish] for s in sequences]
    if sharding.is_primary_process():
        Path(out).write_text(json.dumps({"said": said, "reused": scheduler.tokens_reused}))


if __name__ == "__main__":
    prepare_process()
    main(*sys.argv[1:])
