"""The parts of `python benchmarks/gpu.py --first`: what a GPU is asked the first time that one is at hand.

Each part runs in a process of its own and yields rows {"figure": name, ...numbers with their units in the key}.
"""

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

import sharding
from sphinx_jax.config import DecoderConfig
from sphinx_jax.kernels import attention as attention_kernels
from sphinx_jax.kernels.attention_blockwise import blockwise_attention
from sphinx_jax.kernels.attention_mask import Causal
from sphinx_jax.kernels.moe import can_use_grouped_matmul, choose_implementation, moe_ffn
from sphinx_jax.kernels.quantized import QuantizedDtype, quantize
from sphinx_jax.memory_plan.aot import memory_analysis

Row = dict[str, Any]
Seconds = Callable[[Callable[[], Any]], float]
"""Times a function that returns arrays."""


class FirstSizes(NamedTuple):
    """What is measured."""

    config: DecoderConfig
    dtype: str
    attention: tuple[int, ...]
    """Positions: SPHINX-MoE's image and a question, those of SPHINX-MoE-1k, and the longest."""
    quantized: tuple[int, ...]
    """Tokens of a decode step."""
    ragged: tuple[int, ...]
    """Tokens of a prefill."""
    pinned_bytes: int
    """More than XLA's default limit of pinned memory, 64 GiB."""


FULL = FirstSizes(DecoderConfig(), "bfloat16", (355, 1519, 4096), (1, 4, 16, 64), (512, 2048, 4096), 66 << 30)
TINY = FirstSizes(
    DecoderConfig(128, 256, 2, num_heads=4, num_kv_heads=2, num_experts=4, vocab_size=256), "float32", (96, 128),
    (1, 4), (32,), 1 << 22,
)  # fmt: skip


class Part(NamedTuple):
    """Rows measured in one process, with changes of its environment; None unsets a variable."""

    rows: Callable[[FirstSizes, Seconds], Iterator[Row]]
    environment: dict[str, str | None] = {}  # noqa: RUF012 (never changed)


def random_array(seed: int, *shape: int, dtype: str, scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def pool(sizes: FirstSizes, seconds: Seconds) -> Iterator[Row]:
    """What XLA's allocator takes of the GPU, for the fraction in the environment."""
    stats = jax.local_devices()[0].memory_stats() or {}
    yield {
        "figure": "pool",
        "fraction": os.environ.get("XLA_CLIENT_MEM_FRACTION", "jax's default"),
        "bytes_limit": stats.get("bytes_limit"),
    }


def pinned(sizes: FirstSizes, seconds: Seconds) -> Iterator[Row]:
    """Pinned host memory in arrays of the size of an expert, up to `pinned_bytes`, and what stops it."""
    expert = np.zeros(expert_bytes(sizes.config) // 4, np.float32)
    host = SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
    start, arrays, error = time.perf_counter(), [], ""
    try:
        while sum(x.nbytes for x in arrays) < sizes.pinned_bytes:
            arrays.append(jax.block_until_ready(jax.device_put(expert, host)))
    except jax.errors.JaxRuntimeError as problem:
        error = str(problem).splitlines()[0]
    yield {
        "figure": "pinned memory",
        "limit_gb": os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "XLA's default"),
        "pinned_bytes": sum(x.nbytes for x in arrays),
        "seconds": time.perf_counter() - start,
        "error": error,
    }


def expert_bytes(config: DecoderConfig, bits: int = 16) -> int:
    """Of the matrices of one expert."""
    return 3 * config.dim * config.hidden_dim * bits // 8


def copies(sizes: FirstSizes, seconds: Seconds) -> Iterator[Row]:
    """Copies of one expert from pinned memory, in int4, int8 and bfloat16; and 8 bytes to the host after a program."""
    device = jax.local_devices()[0]
    for bits in (4, 8, 16):
        expert = np.zeros(expert_bytes(sizes.config, bits), np.int8)
        host = jax.device_put(expert, SingleDeviceSharding(device, memory_kind="pinned_host"))
        taken = seconds(lambda host=host: jax.device_put(host, SingleDeviceSharding(device, memory_kind="device")))
        yield {"figure": "copy of an expert", "bytes": expert.nbytes, "gb_s": expert.nbytes / taken / 1e9}
    add, ids = jax.jit(lambda x: x + 1), jnp.zeros(2, jnp.int32)
    yield {"figure": "8 bytes to the host", "us": 1e6 * seconds(lambda: np.asarray(add(ids)))}


def attention(sizes: FirstSizes, seconds: Seconds) -> Iterator[Row]:
    """Causal attention by cuDNN, by the default implementation and in blocks, forward and with its gradient."""
    config = sizes.config
    group = config.num_heads // config.num_kv_heads
    implementations = {
        "cudnn": attention_kernels._local_cudnn,
        "default": lambda q, k, v: attention_kernels.attention(q, k, v, Causal()),
        "blockwise": lambda q, k, v: blockwise_attention(q, k, v, Causal(), 512),
    }
    if jax.default_backend() != "gpu":
        del implementations["cudnn"]
    for length in sizes.attention:
        shapes = ((config.num_kv_heads, group, config.head_dim), *((config.num_kv_heads, config.head_dim),) * 2)
        q, k, v = (random_array(i, 1, length, *shape, dtype=sizes.dtype) for i, shape in enumerate(shapes))
        reference = jax.jit(implementations["blockwise"])(q, k, v)
        for name, function in implementations.items():
            forward = jax.jit(function)
            both = jax.jit(jax.grad(functools.partial(_sum_of, function), (0, 1, 2)))
            error = jnp.linalg.norm((forward(q, k, v) - reference).astype(jnp.float32))
            yield {
                "figure": "attention",
                "implementation": name,
                "positions": length,
                "forward_ms": 1e3 * seconds(lambda f=forward, args=(q, k, v): f(*args)),
                "forward_backward_ms": 1e3 * seconds(lambda f=both, args=(q, k, v): f(*args)),
                "relative_error": float(error / jnp.linalg.norm(reference.astype(jnp.float32))),
            }


def routing(sizes: FirstSizes, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Experts [tokens, k] drawn at random, and equal weights."""
    random, k = np.random.default_rng(tokens), sizes.config.experts_per_token
    chosen = random.random((tokens, sizes.config.num_experts)).argsort(-1)[:, :k]
    return jnp.asarray(chosen, jnp.int32), jnp.full((tokens, k), 1 / k, sizes.dtype)


def compile_all(functions: list[Callable], args: list[tuple], slices_in_place: bool) -> list[jax.stages.Compiled]:
    """Each function compiled for its arguments on one device, all at once: six minutes are short."""
    programs = [sharding.Program(function, slices_in_place=slices_in_place) for function in functions]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda program, args: program.compile(args, sharding.make_mesh()), programs, args))


def expert_matrices(sizes: FirstSizes) -> list[jax.Array]:
    """w_in and w_out of one layer."""
    config = sizes.config
    shapes = (config.num_experts, config.dim, 2, config.hidden_dim), (config.num_experts, config.hidden_dim, config.dim)
    return [random_array(i, *shape, dtype=sizes.dtype, scale=0.02) for i, shape in enumerate(shapes)]


def quantized(sizes: FirstSizes, seconds: Seconds) -> Iterator[Row]:
    """The experts of one layer in a decode step, and whether the compiled product reads the integers."""
    matrices = expert_matrices(sizes)
    kinds: tuple[QuantizedDtype | None, ...] = (None, "int8", "int4")
    for kind in kinds:
        weights = [quantize(w, kind, axis) for w, axis in zip(matrices, (-3, -2), strict=True)] if kind else matrices
        inputs = [random_array(2, tokens, sizes.config.dim, dtype=sizes.dtype) for tokens in sizes.quantized]
        forward = [functools.partial(_experts, moe_ffn, *routing(sizes, len(x))) for x in inputs]
        # As the engine's decode step.
        programs = compile_all(forward, [(x, *weights) for x in inputs], slices_in_place=False)
        for tokens, x, compiled in zip(sizes.quantized, inputs, programs, strict=True):
            temporaries = memory_analysis(compiled).temporaries
            yield {
                "figure": "experts, quantized",
                "weights": kind or sizes.dtype,
                "tokens": tokens,
                "ms": 1e3 * seconds(lambda f=compiled, args=(x, *weights): f(*args)),
                "temporaries_bytes": temporaries,
                "writes_a_matrix": temporaries >= matrices[1].nbytes // sizes.config.num_experts,
            }


def _experts(function: Callable, chosen: jax.Array, gates: jax.Array, x: jax.Array, *w: jax.Array) -> jax.Array:
    return function(x, chosen, gates, *w)


def _sum_of(function: Callable, *args: jax.Array) -> jax.Array:
    """A loss whose gradient is that of the function."""
    return jnp.sum(function(*args).astype(jnp.float32))


def ragged(sizes: FirstSizes, seconds: Seconds) -> Iterator[Row]:
    """`lax.ragged_dot` against the default implementation of the experts, forward and with gradients of the weights."""
    matrices = expert_matrices(sizes)
    for tokens in sizes.ragged:
        chosen, gates = routing(sizes, tokens)
        args = random_array(2, tokens, sizes.config.dim, dtype=sizes.dtype), *matrices
        k, can_group = chosen.shape[1], can_use_grouped_matmul(args[0], matrices[0])
        default = choose_implementation(jax.default_backend(), tokens, k, sizes.config.num_experts, can_group)
        for name, function in {"ragged_dot": ragged_dot_experts, default: moe_ffn}.items():
            forward = functools.partial(_experts, function, chosen, gates)
            both = jax.grad(functools.partial(_sum_of, forward), (0, 1, 2))
            programs = compile_all([forward, both], [args, args], slices_in_place=True)
            forward_seconds, both_seconds = (seconds(lambda f=f, args=args: f(*args)) for f in programs)
            yield {
                "figure": "experts",
                "implementation": name,
                "tokens": tokens,
                "forward_ms": 1e3 * forward_seconds,
                "forward_backward_ms": 1e3 * both_seconds,
            }


def ragged_dot_experts(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, w_in: jax.Array, w_out: jax.Array
) -> jax.Array:
    """The experts by `jax.lax.ragged_dot`, with tokens sorted by expert."""
    order = jnp.argsort(chosen.reshape(-1))
    rows = x[order // chosen.shape[1]]
    sizes = jnp.bincount(chosen.reshape(-1), length=len(w_in)).astype(jnp.int32)
    gate, up = jnp.split(jax.lax.ragged_dot(rows, w_in.reshape(*w_in.shape[:2], -1), sizes), 2, axis=1)
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, w_out, sizes)
    return jnp.sum(out[jnp.argsort(order)].reshape(*chosen.shape, -1) * weights[..., None], axis=1)


_FRACTION, _HOST_LIMIT = "XLA_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"

PARTS = {
    "pool by default": Part(pool, {_FRACTION: None}),
    "pool": Part(pool),
    "attention": Part(attention),
    "quantized": Part(quantized),
    "copies": Part(copies),
    "ragged_dot": Part(ragged),
    "pinned memory": Part(pinned, {_HOST_LIMIT: "70"}),
    "pinned memory by default": Part(pinned, {_HOST_LIMIT: None}),
}
"""The part of gpu.py that trains runs before "ragged_dot"."""


def write_log(folder: Path, facts: dict[str, str], rows: list[Row], problems: dict[str, str]) -> Path:
    """A file of the log, named by date and GPU: a table for each figure. An earlier one of that day is not replaced."""
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    stem, number = f"{facts['date']}-{name}", 1
    while (file := folder / f"{stem}{f'-{number}' if number > 1 else ''}.md").exists():
        number += 1
    lines = [f"# {facts['date']}, {facts['device']}: `python benchmarks/gpu.py --first`", ""]
    lines += [f"{facts['versions']}, driver {facts['driver']}, commit {facts['commit']}."]
    for figure in dict.fromkeys(row["figure"] for row in rows):
        group = [row for row in rows if row["figure"] == figure]
        columns = [key for key in dict.fromkeys(key for row in group for key in row) if key != "figure"]
        lines += [
            "",
            f"## {figure[0].upper()}{figure[1:]}",
            "",
            f"| {' | '.join(columns)} |",
            "| --- " * len(columns) + "|",
        ]
        lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in group]
    lines += ["", *(f"{part}: {problem}" for part, problem in problems.items())]
    file.write_text("\n".join(lines).rstrip() + "\n")
    return file


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return (
        "" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )
