"""Near the limit of one GPU? Mixtral-shaped models with random weights: prompts, words, training steps, experts.

python benchmarks/gpu.py [--json FILE] [--markdown FILE] [--minutes 8] [--tiny]

As many of Mixtral-8x7B's full-width layers as the card holds in bfloat16, all 32 on an H200; for training, as many as
it holds with float32 weights and moments. A share is the time that the work takes at least, at the rates of this very
card measured first (a large bfloat16 product, reading a large array), over the time that it took. A ratio is
transformers' time over ours, on the same card, where torch sees it too. Each part runs in a process of its own, so that
its memory is its own; one that fails or runs out of time leaves the rest in place. --tiny runs all of it on any device
with a model of a few thousand parameters: whether it works, not how fast.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jobs import Job, Ours, clock, made_up, training

import sharding
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.kernels.moe import choose_implementation, has_kernels, moe_ffn

PARTS = ("inference", "transformers", "training", "transformers training", "experts")

REPETITIONS = 5

KEPT_FREE = 8e9
"""Bytes that weights leave for the cache and for temporaries."""

TRAINED_BYTES = 20
"""Of a parameter that learns: weight and moments in float32, weight and gradient in bfloat16, and what adds up."""


class Sizes(NamedTuple):
    """What is measured. `experts` are numbers of tokens, `training` is (sequences, length); `piece` is how many tokens
    of a prompt are read at a time, None as the engine does."""

    full: DecoderConfig
    dtype: str
    prompts: tuple[int, ...]
    piece: int | None
    answers: tuple[int, ...]
    training: tuple[int, int]
    experts: tuple[int, ...]
    product: int
    read: int


FULL = Sizes(
    DecoderConfig(), "bfloat16", (512, 2048, 8192), None, (1, 8, 64), (2, 2048),
    (1, 8, 64, 512, 2048, 8192), 8192, 1 << 31,
)  # fmt: skip
TINY = Sizes(
    DecoderConfig(64, 128, 2, num_heads=4, num_kv_heads=2, num_experts=4, vocab_size=256), "float32", (64, 128), 64,
    (1, 2), (1, 64), (1, 16), 256, 1 << 20,
)  # fmt: skip


def layers_that_fit(config: DecoderConfig, memory: float, parameter_bytes: int) -> DecoderConfig:
    """`config` with at most as many of its layers as leave KEPT_FREE of `memory` bytes."""
    ends = 2 * config.vocab_size * config.dim
    attention = 2 * config.dim * config.head_dim * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * config.num_experts * config.dim * config.hidden_dim
    fit = int((memory - KEPT_FREE) / parameter_bytes - ends) // layer
    return DecoderConfig(**vars(config) | {"num_layers": max(1, min(config.num_layers, fit))})


def memory() -> float:
    """Bytes that jax may take of the device; of one that does not say, such as a CPU, any number."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 1e15)


def peak_memory() -> int | None:
    """Of this process so far; None where the device does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def median(run: Callable[[], None], repetitions: int = REPETITIONS) -> float:
    """Seconds, after two runs to warm up."""
    run(), run()
    return statistics.median(clock(run) for _ in range(repetitions))


def each(run: Callable[[], jax.Array], number: int = 10) -> float:
    """Seconds of one of `number` runs waited for together: the device is never idle between them."""

    def all_of_them() -> None:
        results = [run() for _ in range(number)]
        jax.block_until_ready(results)

    return median(all_of_them) / number


# Parts: each yields rows, dicts that the parent puts together.


def rates(sizes: Sizes) -> dict:
    """Operations a second of a large product, and bytes a second of reading a large array."""
    n = sizes.product
    a = made_up(jax.ShapeDtypeStruct((n, n), sizes.dtype))
    product = jax.jit(lambda a: a @ a)
    seconds = each(lambda: product(a))
    array = made_up(jax.ShapeDtypeStruct((sizes.read // 1024, 1024), jnp.bfloat16))
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    return {"flops": 2 * n**3 / seconds, "bandwidth": array.nbytes / each(lambda: total(array))}


def device(sizes: Sizes) -> dict:
    return {"device": jax.local_devices()[0].device_kind, **rates(sizes)}


def timed(label: str, job: Job, measured: dict) -> dict:
    seconds = median(job.run)
    least = max(job.flops / measured["flops"], job.bytes / measured["bandwidth"])
    return {"job": label, "seconds": seconds, "tokens": job.tokens, "share": least / seconds}


def jobs_of(sizes: Sizes) -> list[tuple[str, str, object]]:
    """(label, kind, argument) of what both sides do in answering."""
    random = np.random.default_rng(0)
    draw = lambda length: random.integers(3, sizes.full.vocab_size, (1, length)).astype(np.int32)
    jobs = [(f"prefill {length:,}", "prefill", draw(length)) for length in sizes.prompts]
    return jobs + [(f"decode, batch {rows}", "decode", rows) for rows in sizes.answers]


def inference(sizes: Sizes) -> Iterator[dict]:
    measured = device(sizes)
    yield measured
    config = layers_that_fit(sizes.full, memory(), jnp.dtype(sizes.dtype).itemsize)
    ours = Ours(SphinxConfig(config, vision=None), sizes.dtype)
    yield {"layers": config.num_layers}
    make = {"prefill": lambda tokens: ours.prefill(tokens, sizes.piece), "decode": ours.decode}
    with ThreadPoolExecutor(4) as pool:
        waiting = [(label, pool.submit(make[kind], argument)) for label, kind, argument in jobs_of(sizes)]
        # All compiled before any is timed: compiling tries kernels out on the device.
        jobs = [(label, made.result()) for label, made in waiting]
    del waiting
    planned = max(job.planned_bytes for _, job in jobs)
    while jobs:
        # Let go of each when it is done, and of its cache with it.
        yield timed(*jobs.pop(0), measured)
    yield {"memory": {"inference": {"planned": planned, "peak": peak_memory()}}}


def train(sizes: Sizes) -> Iterator[dict]:
    measured = device(sizes)
    config = layers_that_fit(sizes.full, memory(), TRAINED_BYTES)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, sizes.training).astype(np.int32)
    yield {"training_layers": config.num_layers}
    job = training(SphinxConfig(config, vision=None), tokens, sizes.dtype)
    yield timed("training step", job, measured)
    yield {"memory": {"training": {"planned": job.planned_bytes, "peak": peak_memory()}}}


def experts(sizes: Sizes) -> Iterator[dict]:
    """Each form of one layer's experts, forwards and with its gradient."""
    config, dtype = sizes.full, jnp.dtype(sizes.dtype)
    dims = config.num_experts, config.dim, config.hidden_dim
    like = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    w_in, w_out = made_up((like(dims[0], dims[1], 2, dims[2]), like(dims[0], dims[2], dims[1])))
    random = np.random.default_rng(0)
    k = config.experts_per_token
    for tokens in sizes.experts:
        x = jnp.asarray(random.normal(size=(tokens, config.dim)), dtype)
        chosen = jnp.asarray(random.random((tokens, config.num_experts)).argsort(-1)[:, :k], jnp.int32)
        weights = jnp.full((tokens, k), 1 / k, dtype)
        kernels = has_kernels(x, w_in)
        usual = choose_implementation(jax.default_backend(), tokens, k, config.num_experts, kernels)
        # The others are far from any use: reading one matrix a word, or eight experts' work on thousands.
        forms = {usual} | ({"groups"} if kernels else set()) | ({"chosen"} if tokens <= 8 else set())
        forms |= ({"every"} if tokens <= 256 else set()) | ({"blocks", "ragged_dot"} if tokens == 2048 else set())
        for form in sorted(forms):
            seconds = form_seconds(form, x, chosen, weights, w_in, w_out)
            flops = 6 * tokens * k * config.dim * config.hidden_dim
            yield {"tokens": tokens, "form": form, "usual": form == usual, "flops": flops} | seconds


def form_seconds(form: str, x: jax.Array, chosen: jax.Array, weights: jax.Array, *matrices: jax.Array) -> dict:
    """`form` is one of ours, or jax's own product of rows by groups."""
    ours = lambda x, *matrices: moe_ffn(x, chosen, weights, *matrices, form)
    stock = lambda x, *matrices: by_ragged_dot(x, chosen, weights, *matrices)
    forward, mesh = stock if form == "ragged_dot" else ours, sharding.make_mesh()
    gradient = jax.grad(lambda *args: jnp.sum(forward(*args).astype(jnp.float32)), argnums=(0, 1, 2))

    def seconds(function: Callable) -> float:
        compiled = sharding.Program(function, slices_in_place=True).compile((x, *matrices), mesh)
        return each(lambda: compiled(x, *matrices), 3)

    return {"forward_s": seconds(forward), "gradient_s": seconds(gradient)}


def by_ragged_dot(x: jax.Array, chosen: jax.Array, weights: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """The experts by `jax.lax.ragged_dot`."""
    order = jnp.argsort(chosen.reshape(-1))
    rows = x[order // chosen.shape[1]]
    sizes = jnp.bincount(chosen.reshape(-1), length=len(w_in)).astype(jnp.int32)
    gate, up = jnp.split(jax.lax.ragged_dot(rows, w_in.reshape(*w_in.shape[:2], -1), sizes), 2, axis=1)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_out, sizes)
    return jnp.sum(out[jnp.argsort(order)].reshape(*chosen.shape, -1) * weights[..., None], axis=1)


def transformers(sizes: Sizes, kind: str) -> Iterator[dict]:
    """The other side, in bfloat16 throughout, moments of AdamW too, which spares it half of what ours moves."""
    from peer import Theirs, torch

    on = "cuda" if torch.cuda.is_available() else "cpu"
    size = torch.cuda.get_device_properties(0).total_memory * 0.93 if on == "cuda" else memory()
    yield {"torch": torch.cuda.get_device_name(0) if on == "cuda" else "cpu"}
    width = jnp.dtype(sizes.dtype).itemsize if kind == "inference" else TRAINED_BYTES
    theirs = Theirs.made_up(layers_that_fit(sizes.full, size, width), on, sizes.dtype)
    if kind == "inference":
        jobs = jobs_of(sizes)
    else:
        tokens = np.random.default_rng(0).integers(3, sizes.full.vocab_size, sizes.training).astype(np.int32)
        jobs = [("training step", "train", tokens)]
    for label, kind, argument in jobs:
        best, run = theirs.fastest(kind, argument)
        yield {"job": label, "theirs_s": median(run, 3), "their_experts": best}


RUN = {
    "transformers": lambda sizes: transformers(sizes, "inference"),
    "inference": inference,
    "experts": experts,
    "training": train,
    "transformers training": lambda sizes: transformers(sizes, "training"),
}


# The parent: one process for each part, and the report.


def measure(part: str, tiny: bool, until: float) -> tuple[list[dict], str | None]:
    """The rows of a part run in a process of its own, and what went wrong with it, if anything."""
    command = [sys.executable, __file__, "--part", part, *(["--tiny"] if tiny else [])]
    # jax takes its memory at the start, and one process after the other may have nearly all of it.
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=max(1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        errors += "\nran out of time"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows, errors.strip().splitlines()[-1] if process.returncode else None


def report(found: dict[str, list[dict]], problems: dict[str, str]) -> dict:
    """One object of all parts: facts, `jobs` with both sides' times joined, `experts`, `problems`."""
    facts, jobs, memory = {}, {}, {}
    for part in (p for p in PARTS if p != "experts"):
        for row in found[part]:
            if "job" in row:
                jobs.setdefault(row["job"], {}).update(row)
            memory |= row.get("memory", {})
            facts |= {key: value for key, value in row.items() if "job" not in row}
    for job in jobs.values():
        if "seconds" in job and "theirs_s" in job:
            job["ratio"] = job["theirs_s"] / job["seconds"]
    return facts | {"memory": memory, "jobs": list(jobs.values()), "experts": found["experts"], "problems": problems}


def markdown(result: dict) -> str:
    """The report as tables. A cell is empty where nothing was measured."""
    number = lambda value, form, factor=1.0: "" if value is None else format(value * factor, form)
    of = lambda row, key, form, factor=1.0: number(row.get(key), form, factor)
    lines = [
        f"{result['date']}, {result.get('device', 'no device')}, {result['versions']}, commit {result['commit']}: "
        f"{of(result, 'flops', '.0f', 1e-12)} Tflop/s of a large product, {of(result, 'bandwidth', '.0f', 1e-9)} GB/s "
        f"read; {result.get('layers', 'no')} layers to answer, {result.get('training_layers', 'no')} to train",
        "",
        "| job | ms | tokens/s | share of the limit | transformers, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for job in result["jobs"]:
        rate = job["tokens"] / job["seconds"] if "seconds" in job else None
        cells = (
            job["job"], of(job, "seconds", ".2f", 1e3), number(rate, ",.0f"), of(job, "share", ".2f"),
            of(job, "theirs_s", ".2f", 1e3), of(job, "ratio", ".2f"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| memory of | planned, GiB | at its peak, GiB |", "| --- | --- | --- |"]
    for part, held in result["memory"].items():
        lines.append(f"| {part} | {of(held, 'planned', '.2f', 2**-30)} | {of(held, 'peak', '.2f', 2**-30)} |")
    lines += ["", "| experts of tokens | form | forward, ms | Tflop/s | gradient too, ms | Tflop/s |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in result["experts"]:
        rates = (row["flops"] / row["forward_s"], 3 * row["flops"] / row["gradient_s"])
        form = row["form"] + (" (usual)" if row["usual"] else "")
        forward, gradient = (f"{row[key] * 1e3:.3f}" for key in ("forward_s", "gradient_s"))
        cells = (f"{row['tokens']:,}", form, forward, f"{rates[0] / 1e12:.1f}", gradient, f"{rates[1] / 1e12:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{part}: {problem}" for part, problem in result["problems"].items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    parser.add_argument("--minutes", type=float, default=8, help="what has not been measured by then is left out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on any device: whether it works")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        for row in RUN[options.part](TINY if options.tiny else FULL):
            print(json.dumps(row), flush=True)
        return 0
    until = time.monotonic() + 60 * options.minutes
    found, problems = {}, {}
    for part in PARTS:
        found[part], problem = measure(part, options.tiny, until)
        problems |= {part: problem} if problem else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = report(found, problems) | {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")),
    }
    print(markdown(result), end="")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(result))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
