"""Long prompts arrive while sequences stream: how long these stand still, and what it costs, beside transformers.

python benchmarks/serving.py [--preset NAME] [--streams N] [--arrivals N]

Some sequences stream, each with a short prompt and an answer of one length. When all have begun, prompts of 1,500
tokens come one after another, each as the one before has its first token. A delivery is what a client receives at
once: one token of transformers, one or more of ours. The file row has the same requests and nobody who waits for
tokens. transformers' side is its continuous batching, with the same weights in float32 and the same threads. The sides
take turns; loading and compiling are left out. Needs the parity extra.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jobs import save_synthetic

import sphinx_jax
from sphinx_jax import Sphinx
from sphinx_jax.cli.startup import keep_freed_memory, prepare_process
from sphinx_jax.inference import bucketing, generate, warmup
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import Scheduler

try:
    from peer import TransformersModel
except ImportError:
    sys.exit("error: this benchmark compares with transformers on torch; run pip install -e '.[parity]'")

SHORT, LONG = 64, 1500
"""Tokens of the prompts."""
STREAMED, ARRIVED = 96, 8
"""Tokens of the answers."""
MAX_MODEL_LEN, SLOTS = 2048, 32
REPETITIONS = 3
PEER_BLOCKS = 64
"""Of 256 positions each: more than all requests need."""


@dataclasses.dataclass
class Run:
    """What clients saw of one run."""

    between: list[float]
    """Seconds between a streaming sequence's deliveries, all sequences together."""
    first: list[float]
    """Seconds to the first token of each prompt that arrived."""
    seconds: float


Prompts = tuple[list[np.ndarray], list[np.ndarray]]
"""Those of the sequences that stream, and those that arrive later."""


def random_prompts(vocab_size: int, streams: int, arrivals: int, seed: int) -> Prompts:
    random = np.random.default_rng(seed)
    short, long = random.integers(3, vocab_size, (streams, SHORT)), random.integers(3, vocab_size, (arrivals, LONG))
    return list(short), list(long)


def drive(
    submit: Callable[[np.ndarray, int], object],
    deliveries: Callable[[], Sequence[tuple[object, bool]]],
    prompts: Prompts,
) -> Run:
    """One run of either side.

    `deliveries` blocks until some of the requests that `submit` returned have tokens, and says which have ended.
    """
    short, long = prompts
    waiting, arrived = list(long), {}
    start = time.perf_counter()
    last: dict[object, float | None] = {submit(prompt, STREAMED): None for prompt in short}
    run, ended, first = Run([], [], 0), 0, set()
    while ended < len(short) + len(long):
        for request, finished in deliveries():
            now = time.perf_counter()
            if request in last:
                before, last[request] = last[request], now
                if before is not None:
                    run.between.append(now - before)
            elif request not in first:
                first.add(request)
                run.first.append(now - arrived[request])
            ended += finished
        if waiting and None not in last.values() and len(first) == len(arrived):
            arrived[submit(waiting.pop(), ARRIVED)] = time.perf_counter()
    run.seconds = time.perf_counter() - start
    return run


def request_of(prompt: np.ndarray, tokens: int) -> Request:
    return Request(prompt.tolist(), None, SamplingParams(max_new_tokens=tokens, ignore_eos=True))


class Streaming:
    """Our scheduler as the server runs it."""

    def __init__(self, model: Sphinx):
        shape = generate.state_shape(model.engine, SLOTS, MAX_MODEL_LEN)
        self.scheduler = Scheduler(model.engine, shape, bucketing.SERVER_CHUNKS)
        warmup.compile_all(model.engine, shape, bucketing.SERVER_CHUNKS)

    def run(self, prompts: Prompts) -> Run:
        def submit(prompt: np.ndarray, tokens: int) -> object:
            return self.scheduler.submit(request_of(prompt, tokens), streams=True)

        return drive(submit, lambda: [(s, s.finish is not None) for s in self.scheduler.step()], prompts)


def in_file(model: Sphinx, prompts: Prompts) -> float:
    """Seconds for the same requests in a file of questions."""
    short, long = prompts
    requests = [request_of(prompt, STREAMED) for prompt in short] + [request_of(prompt, ARRIVED) for prompt in long]
    start = time.perf_counter()
    generate.run_all(model.engine, requests, SLOTS)
    return time.perf_counter() - start


def row(name: str, runs: list[Run], tokens: int) -> str:
    between, first = np.concatenate([r.between for r in runs]), np.concatenate([r.first for r in runs])
    quantiles = " | ".join(f"{1000 * q:.0f}" for q in np.quantile(between, [0.5, 0.99, 1]))
    seconds = float(np.median([r.seconds for r in runs]))
    return f"| {name} | {quantiles} | {np.median(first):.2f} | {tokens / seconds:.0f} |"


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mixtral-140m")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--arrivals", type=int, default=8)
    options = parser.parse_args()
    prepare_process()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = save_synthetic(options.preset, Path(directory), ["native", "mixtral"])
        model = sphinx_jax.load(ours, max_model_len=MAX_MODEL_LEN)
        streaming = Streaming(model)
        peer = TransformersModel.from_checkpoint(theirs).continuous_batching(
            num_blocks=PEER_BLOCKS, max_batch_tokens=MAX_MODEL_LEN
        )
    vocab_size = model.config.language.vocab_size
    tokens = options.streams * STREAMED + options.arrivals * ARRIVED
    found: dict[str, list[Run]] = {"sphinx-jax": [], "transformers": []}
    files = []
    try:
        for repetition in range(1 + REPETITIONS):
            # New prompts each time: none is reused from the run before.
            prompts = [
                random_prompts(vocab_size, options.streams, options.arrivals, 3 * repetition + i) for i in range(3)
            ]
            runs = streaming.run(prompts[0]), drive(peer.submit, peer.deliveries, prompts[1])
            seconds = in_file(model, prompts[2])
            if repetition:
                for side, run in zip(found.values(), runs, strict=True):
                    side.append(run)
                files.append(seconds)
    finally:
        peer.stop()
    print(f"{options.preset}, {options.streams} streams of {STREAMED} tokens, {options.arrivals} prompts of {LONG}\n")
    print("| side | between deliveries, ms: p50 | p99 | longest | time to first token of an arrival, s | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in found.items():
        print(row(name, runs, tokens))
    print(f"| sphinx-jax, file | - | - | - | - | {tokens / np.median(files):.0f} |")


if __name__ == "__main__":
    main()
