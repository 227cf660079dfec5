"""One GPU against its roofline: prefill, decode, training steps and experts of Mixtral-shaped models.

python benchmarks/gpu.py [--json FILE] [--markdown FILE] [--minutes 8] [--tiny]
python benchmarks/gpu.py --first [--log FOLDER] [--minutes 6] [--tiny]

The models have full-width layers of Mixtral-8x7B with synthetic weights: for inference as many as fit into the GPU in
bfloat16, all 32 on an H200; for training as many as fit with float32 weights and moments. The roofline fraction is the
roofline lower bound of a job's time, from rates that are measured first on the same GPU (a large bfloat16 matmul, a
large read), over the measured time. The ratio is the time of transformers over ours on the same GPU, if torch has CUDA.
Each part runs in its own process with its own memory; a part that fails or times out leaves the others intact. --tiny
is a smoke test on any device, with a model of a few thousand parameters. --first measures what no GPU has shown yet
(`first_card.py`), and training, and writes the figures to a file of benchmarks/log/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import first_card
import jax
import jax.numpy as jnp
import numpy as np
from first_card import ragged_dot_experts
from gpu_report import markdown, report, run_facts
from jobs import Job, OurModel, synthetic_arrays, time_once

import sharding
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.costs import Workload, forward_flops
from sphinx_jax.kernels.moe import can_use_grouped_matmul, choose_implementation, moe_ffn
from sphinx_jax.memory_plan.aot import memory_analysis
from sphinx_jax.training.moments import Moments
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import ComputeDtype, TrainConfig
from sphinx_jax.training.train_state import init_state

PARTS = ("inference", "transformers", "training", "transformers training", "experts")

FIRST = (
    "pool by default", "pool", "attention", "quantized", "copies", "training", "ragged_dot", "pinned memory",
    "pinned memory by default",
)  # fmt: skip
"""Parts of --first: `first_card.PARTS`, and training. Last what takes longest and teaches least if time runs out."""

LOG = Path(__file__).parent / "log"

REPETITIONS = 5

MEMORY_FRACTION = 0.93
"""Of the device memory, for either side."""

RESERVED_BYTES = 8e9
"""Device memory that weights leave for the KV cache and temporaries."""

TRAIN_BYTES_PER_PARAM = 24
"""Weight, two moments and accumulated gradient in float32, weight and gradient in bfloat16, and temporaries."""

OPTIMIZER_BYTES: dict[Moments, int] = {"float32": 26, "bfloat16": 18}
"""Bytes of a parameter that AdamW moves: the gradient in bfloat16 is read; weight and moments are read and written."""

FIXED_BYTES, MATMUL_FRACTION = 10, 0.616
"""The two numbers of the model of a training step, of the H200 of 2026-11-26: 49 ms and 21.5 µs a token with four
layers. Of each parameter so many bytes more move (cast to bfloat16, gradient written and summed); FLOPs run at so much
of the rate of one large matmul."""


class Sizes(NamedTuple):
    """What is measured."""

    full: DecoderConfig
    dtype: ComputeDtype
    prompt_lens: tuple[int, ...]
    chunk_len: int | None
    """Tokens of a prefill chunk; the engine's by default."""
    decode_batch_sizes: tuple[int, ...]
    training: tuple[int, int]
    """(batch size, length) of a microbatch."""
    accumulation: tuple[int, ...]
    """Microbatches of a training step."""
    experts: tuple[int, ...]
    """Numbers of tokens."""
    matmul: int
    """Rows and columns of the matmul that measures FLOP/s."""
    read: int
    """Bytes of the array that measures bandwidth."""


FULL = Sizes(
    DecoderConfig(), "bfloat16", (512, 2048, 8192), None, (1, 8, 64), (2, 2048), (1, 4, 8),
    (1, 8, 64, 512, 2048, 8192), 8192, 1 << 31,
)  # fmt: skip
TINY = Sizes(
    DecoderConfig(64, 128, 2, num_heads=4, num_kv_heads=2, num_experts=4, vocab_size=256), "float32", (64, 128), 64,
    (1, 2), (1, 64), (1, 2), (1, 16), 256, 1 << 20,
)  # fmt: skip


def layers_that_fit(config: DecoderConfig, memory: float, parameter_bytes: int) -> DecoderConfig:
    """`config` with as many of its layers as leave RESERVED_BYTES of `memory` bytes free, at least one."""
    embedding_and_head = 2 * config.vocab_size * config.dim
    attention = 2 * config.dim * config.head_dim * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * config.num_experts * config.dim * config.hidden_dim
    fit = int((memory - RESERVED_BYTES) / parameter_bytes - embedding_and_head) // layer
    return DecoderConfig(**vars(config) | {"num_layers": max(1, min(config.num_layers, fit))})


def memory_limit() -> float:
    """Bytes that jax may allocate on the device; a large number on a device that does not report it, such as a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 1e15)


def peak_memory() -> int | None:
    """Of this process so far; None on a device that does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def median_seconds(run: Callable[[], object], repetitions: int = REPETITIONS) -> float:
    """After two warm-up runs."""
    run()
    run()
    return statistics.median(time_once(run) for _ in range(repetitions))


def pipelined_seconds(run: Callable[[], Any], count: int = 10) -> float:
    """Seconds of one of `count` runs that are dispatched at once: the device is never idle between them."""
    return median_seconds(lambda: jax.block_until_ready([run() for _ in range(count)])) / count


# Parts: each yields rows, dicts that the parent process joins.


def device_rates(sizes: Sizes) -> dict:
    """The device, its FLOP/s in a large matmul, and its bytes/s in a large read."""
    n = sizes.matmul
    a = synthetic_arrays(jax.ShapeDtypeStruct((n, n), jnp.dtype(sizes.dtype)))
    matmul = jax.jit(lambda a: a @ a)
    flops = 2 * n**3 / pipelined_seconds(lambda: matmul(a))
    array = synthetic_arrays(jax.ShapeDtypeStruct((sizes.read // 1024, 1024), jnp.dtype(jnp.bfloat16)))
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    bandwidth = array.nbytes / pipelined_seconds(lambda: total(array))
    return {"device": jax.local_devices()[0].device_kind, "flops": flops, "bandwidth": bandwidth}


def measure_job(label: str, job: Job, rates: dict) -> dict:
    seconds = median_seconds(job.run)
    lower_bound = max(job.flops / rates["flops"], job.bytes / rates["bandwidth"])
    return {"job": label, "seconds": seconds, "tokens": job.tokens, "roofline_fraction": lower_bound / seconds}


def inference_jobs(sizes: Sizes) -> list[tuple[str, str, Any]]:
    """(label, kind, argument) of the inference jobs of both sides."""
    random = np.random.default_rng(0)
    prompts = {n: random.integers(3, sizes.full.vocab_size, (1, n)).astype(np.int32) for n in sizes.prompt_lens}
    return [
        *((f"prefill {length:,}", "prefill", tokens) for length, tokens in prompts.items()),
        *((f"decode, batch {size}", "decode", size) for size in sizes.decode_batch_sizes),
    ]


def inference(sizes: Sizes) -> Iterator[dict]:
    rates = device_rates(sizes)
    yield rates
    config = layers_that_fit(sizes.full, memory_limit(), jnp.dtype(sizes.dtype).itemsize)
    ours = OurModel(SphinxConfig(config, vision=None), sizes.dtype)
    yield {"layers": config.num_layers}
    make_job = {"prefill": lambda tokens: ours.prefill(tokens, sizes.chunk_len), "decode": ours.decode}
    with ThreadPoolExecutor(4) as pool:
        futures = [(label, pool.submit(make_job[kind], argument)) for label, kind, argument in inference_jobs(sizes)]
        # All are compiled before any is timed: autotuning runs kernels on the device.
        jobs = [(label, future.result()) for label, future in futures]
    del futures
    planned = max(job.planned_bytes for _, job in jobs)
    while jobs:
        # Each job is dropped after its measurement, and its KV cache freed.
        yield measure_job(*jobs.pop(0), rates)
    yield {"memory": {"inference": {"planned": planned, "peak": peak_memory()}}}


def train(sizes: Sizes) -> Iterator[dict]:
    """Optimizer steps of several sizes, by accumulation, with moments in float32 and bfloat16."""
    rates = device_rates(sizes)
    config = layers_that_fit(sizes.full, memory_limit(), TRAIN_BYTES_PER_PARAM)
    yield rates | {"training_layers": config.num_layers}
    kinds: list[tuple[Moments, int]] = [(moments, n) for moments in OPTIMIZER_BYTES for n in sizes.accumulation]
    with ThreadPoolExecutor(4) as pool:
        # As above: all are compiled before the first weights are made.
        jobs = list(pool.map(lambda kind: train_job(SphinxConfig(config, vision=None), sizes, *kind), kinds))
    planned = max(job.planned_bytes for job, _ in jobs)
    for moments, accum in kinds:
        (job, parameters), label = jobs.pop(0), training_label(sizes, accum, moments)
        moved = parameters * (OPTIMIZER_BYTES[moments] + FIXED_BYTES)
        predicted = moved / rates["bandwidth"] + job.flops / (MATMUL_FRACTION * rates["flops"])
        yield measure_job(label, job, rates) | {"predicted_seconds": predicted}
        del job
    yield {"memory": {"training": {"planned": planned, "peak": peak_memory()}}}


def training_label(sizes: Sizes, accum: int, moments: Moments) -> str:
    batch_size, length = sizes.training
    return f"training step, {batch_size * accum * length:,} tokens, {moments} moments"


def train_job(config: SphinxConfig, sizes: Sizes, moments: Moments, accum: int) -> tuple[Job, int]:
    """An optimizer step of `accum` microbatches, whose state is made when it first runs; and the parameters."""
    (size, length), mesh = sizes.training, sharding.make_mesh()
    train_config = TrainConfig(batch_size=size * accum, grad_accum_steps=accum, dtype=sizes.dtype, moments=moments)
    program = train_program(config, train_config, mesh)
    tokens = np.random.default_rng(0).integers(3, config.language.vocab_size, (size * accum, length)).astype(np.int32)
    batch = {name: jax.device_put(tokens) for name in ("tokens", "labels")}
    compiled = program.step.compile((program.state, batch, {}), mesh)
    states: list[Any] = []

    def run() -> None:
        state = states.pop() if states else init_state(synthetic_arrays(program.params), program.optimizer, mesh)
        states.append(jax.block_until_ready(compiled(state, batch, {})[0]))

    work = Workload(size * accum, length, (length + 1) // 2, length)
    # The backward pass costs two forward passes.
    flops = 3 * forward_flops(config, program.params["model"], mesh, work)["language"].total
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.params))
    return Job(run, tokens.size, flops, 0, memory_analysis(compiled).total), parameters


def experts(sizes: Sizes) -> Iterator[dict]:
    """Each implementation of the experts of one layer, forward and backward."""
    config, dtype = sizes.full, jnp.dtype(sizes.dtype)
    num_experts, dim, hidden_dim = config.num_experts, config.dim, config.hidden_dim
    shapes = (num_experts, dim, 2, hidden_dim), (num_experts, hidden_dim, dim)
    w_in, w_out = synthetic_arrays([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes])
    random = np.random.default_rng(0)
    k = config.experts_per_token
    for tokens in sizes.experts:
        x = jnp.asarray(random.normal(size=(tokens, dim)), dtype)
        chosen = jnp.asarray(random.random((tokens, num_experts)).argsort(-1)[:, :k], jnp.int32)
        weights = jnp.full((tokens, k), 1 / k, dtype)
        can_group = can_use_grouped_matmul(x, w_in)
        default = choose_implementation(jax.default_backend(), tokens, k, num_experts, can_group)
        # Not at all sizes: gather reads one matrix per token, dense computes all experts for every token.
        names = {default} | ({"grouped_matmul"} if can_group else set()) | ({"gather"} if tokens <= 8 else set())
        names |= {"dense"} if tokens <= 256 else set()
        names |= {"sorted_blocks", "ragged_dot"} if tokens == 2048 else set()
        for name in sorted(names):
            seconds = experts_seconds(name, x, chosen, weights, w_in, w_out)
            flops = 6 * tokens * k * dim * hidden_dim
            yield {"tokens": tokens, "implementation": name, "default": name == default, "flops": flops} | seconds


def experts_seconds(
    implementation: Any, x: jax.Array, chosen: jax.Array, weights: jax.Array, *matrices: jax.Array
) -> dict:
    """Of an implementation of `moe_ffn`, or of "ragged_dot"."""

    def forward(x: jax.Array, *matrices: jax.Array) -> jax.Array:
        if implementation == "ragged_dot":
            return ragged_dot_experts(x, chosen, weights, *matrices)
        return moe_ffn(x, chosen, weights, *matrices, implementation=implementation)

    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(forward(*args).astype(jnp.float32))

    def seconds(function: Callable) -> float:
        program = sharding.Program(function, slices_in_place=True)
        compiled = program.compile((x, *matrices), sharding.make_mesh())
        return pipelined_seconds(lambda: compiled(x, *matrices), 3)

    return {
        "forward_seconds": seconds(forward),
        "forward_backward_seconds": seconds(jax.grad(loss, argnums=(0, 1, 2))),
    }


def transformers(sizes: Sizes, kind: str) -> Iterator[dict]:
    """The other side, entirely in bfloat16, AdamW moments included: half of the memory traffic of our optimizer."""
    from peer import TransformersModel, torch

    cuda = torch.cuda.is_available()
    limit = torch.cuda.get_device_properties(0).total_memory * MEMORY_FRACTION if cuda else memory_limit()
    yield {"torch": torch.cuda.get_device_name(0) if cuda else "cpu"}
    parameter_bytes = jnp.dtype(sizes.dtype).itemsize if kind == "inference" else TRAIN_BYTES_PER_PARAM
    config = layers_that_fit(sizes.full, limit, parameter_bytes)
    theirs = TransformersModel.from_config(config, "cuda" if cuda else "cpu", sizes.dtype)
    if kind == "inference":
        jobs = inference_jobs(sizes)
    else:
        tokens = np.random.default_rng(0).integers(3, sizes.full.vocab_size, sizes.training).astype(np.int32)
        jobs = [(training_label(sizes, 1, "bfloat16"), "train", tokens)]
    for label, kind, argument in jobs:
        best, run = theirs.fastest(kind, argument)
        yield {"job": label, "their_seconds": median_seconds(run, 3), "their_experts": best}


RUN = {
    "transformers": lambda sizes: transformers(sizes, "inference"),
    "inference": inference,
    "experts": experts,
    "training": train,
    "transformers training": lambda sizes: transformers(sizes, "training"),
}


# The parent process: one child for each part, and the report.


def measure(
    part: str, tiny: bool, deadline: float, changes: Mapping[str, str | None] = MappingProxyType({})
) -> tuple[list[dict], str | None]:
    """The rows of a part, run in its own process, and its error, if any. `changes` of the environment: None unsets."""
    command = [sys.executable, __file__, "--part", part, *(["--tiny"] if tiny else [])]
    # jax preallocates its memory; only one process runs at a time.
    fraction = {"XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION), "XLA_PYTHON_CLIENT_MEM_FRACTION": None}
    wanted = os.environ | fraction | dict(changes)
    environment = {name: value for name, value in wanted.items() if value is not None}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        errors += "\ntimed out"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows, errors.strip().splitlines()[-1] if process.returncode else None


def measure_first(tiny: bool, deadline: float, folder: Path) -> int:
    """The parts of `first_card.py` and training, into a file of the log. The exit code: 1 if any fails."""
    rows: list[dict] = []
    problems = {}
    for part in FIRST:
        environment = first_card.PARTS[part].environment if part in first_card.PARTS else {}
        found, problem = measure(part, tiny, deadline, environment)
        rows += [row for row in found if "figure" in row]
        rows += [{"figure": "training", **row} for row in found if "job" in row]
        problems |= {part: problem} if problem else {}
    print(first_card.write_log(folder, run_facts(), rows, problems).read_text(), end="")
    return 1 if problems else 0


def run_part(part: str, tiny: bool) -> Iterator[dict]:
    """The rows of one of PARTS or FIRST."""
    if part in first_card.PARTS:
        sizes = first_card.TINY if tiny else first_card.FULL
        return first_card.PARTS[part].rows(sizes, lambda run: pipelined_seconds(run, 3))
    return RUN[part](TINY if tiny else FULL)


def measure_all(tiny: bool, deadline: float, json_file: Path | None, markdown_file: Path | None) -> int:
    """All PARTS, and the report; the exit code: 1 if any fails."""
    found, problems = {}, {}
    for part in PARTS:
        found[part], problem = measure(part, tiny, deadline)
        problems |= {part: problem} if problem else {}
    result = run_facts() | report(found, problems)
    print(markdown(result), end="")
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown(result))
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    parser.add_argument("--first", action="store_true", help="what a GPU is asked first, into a file of the log")
    parser.add_argument("--log", type=Path, default=LOG, help="with --first: the folder of that file")
    parser.add_argument("--minutes", type=float, help="time limit, by default 8, with --first 6")
    parser.add_argument("--tiny", action="store_true", help="a smoke test with a tiny model on any device")
    parser.add_argument("--part", choices=(*PARTS, *FIRST), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        for row in run_part(options.part, options.tiny):
            print(json.dumps(row), flush=True)
        return 0
    deadline = time.monotonic() + 60 * (options.minutes or (6 if options.first else 8))
    if options.first:
        return measure_first(options.tiny, deadline, options.log)
    return measure_all(options.tiny, deadline, options.json, options.markdown)


if __name__ == "__main__":
    sys.exit(main())
