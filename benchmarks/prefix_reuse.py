"""Many questions about few images, as GQA asks: prefill with and without the pool of prefixes, beside transformers.

python benchmarks/prefix_reuse.py [--preset NAME] [--images N] [--questions N]

The decoder alone runs, as transformers has it too: random tokens stand for an image, and every question about it
begins with them. The questions are shuffled. transformers' side is `generate_batch`, which shares blocks of its cache
between prompts with a common beginning, with the same weights in float32 and the same threads. Compiling is left out.
Needs the parity extra.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from jobs import save_synthetic

import sphinx_jax
from sphinx_jax import Sphinx
from sphinx_jax.cli.startup import keep_freed_memory, prepare_process
from sphinx_jax.inference import generate
from sphinx_jax.inference.bucketing import bucket
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import Scheduler

try:
    from peer import TransformersModel
except ImportError:
    sys.exit("error: this benchmark compares with transformers on torch; run pip install -e '.[parity]'")

IMAGE_LEN, QUESTION_LEN, ANSWER_LEN = 289, 20, 4
"""Tokens; 289 is an image of SPHINX at 224 pixels."""
MAX_NUM_SEQS, PREFIXES = 32, 64
MAX_MODEL_LEN = 512


def prompts(vocab_size: int, images: int, questions: int) -> list[np.ndarray]:
    """Each image's tokens with each of its questions, shuffled."""
    random = np.random.default_rng(0)
    prefixes = random.integers(3, vocab_size, (images, IMAGE_LEN))
    asked = [
        np.concatenate([prefix, random.integers(3, vocab_size, QUESTION_LEN)])
        for prefix in prefixes
        for _ in range(questions)
    ]
    random.shuffle(asked)
    return asked


def ours(model: Sphinx, asked: list[np.ndarray], prefixes: int) -> tuple[float, int, list[list[int]]]:
    """(seconds, positions computed by prefill, the answers) with so many prefixes in the pool."""
    cache_len = bucket(IMAGE_LEN + QUESTION_LEN + ANSWER_LEN)
    prefix_bytes = prefixes * model.engine.cache_bytes(model.engine.prefix_len(cache_len))
    scheduler = Scheduler(model.engine, generate.state_shape(model.engine, MAX_NUM_SEQS, cache_len, prefix_bytes))
    params = SamplingParams(max_new_tokens=ANSWER_LEN, ignore_eos=True)
    start = time.perf_counter()
    sequences = [scheduler.submit(Request(prompt.tolist(), None, params)) for prompt in asked]
    while scheduler.has_work:
        scheduler.step()
    return time.perf_counter() - start, scheduler.tokens_prefilled, [sequence.tokens for sequence in sequences]


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mixtral-140m")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--questions", type=int, default=30)
    options = parser.parse_args()
    prepare_process()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        native, mixtral = save_synthetic(options.preset, Path(directory), ["native", "mixtral"])
        model, peer = sphinx_jax.load(native, max_model_len=MAX_MODEL_LEN), TransformersModel.from_checkpoint(mixtral)
    asked = prompts(model.config.language.vocab_size, options.images, options.questions)
    warm = asked[: 2 * MAX_NUM_SEQS]
    rows, answers = [], []
    for label, prefixes in (("with the pool", PREFIXES), ("without it", 0)):
        ours(model, warm, prefixes)
        seconds, computed, answer = ours(model, asked, prefixes)
        rows.append((f"sphinx-jax, {label}", seconds, f"{computed:,}"))
        answers.append(answer)
    assert answers[0] == answers[1], "the pool changed an answer"
    peer.generate_batch(warm[:4], ANSWER_LEN)
    rows.append(("transformers generate_batch", peer.generate_batch(asked, ANSWER_LEN), "-"))
    print(f"{options.images} images of {IMAGE_LEN} tokens, {options.questions} questions of {QUESTION_LEN} about each")
    print(f"prompts have {sum(map(len, asked)):,} tokens\n")
    print("| side | seconds | positions prefilled | times the first |")
    print("| --- | --- | --- | --- |")
    for label, seconds, computed in rows:
        print(f"| {label} | {seconds:.1f} | {computed} | {seconds / rows[0][1]:.1f} |")


if __name__ == "__main__":
    main()
