"""Our side of the benchmarks: prefill, decode steps and training steps, by the programs that users run.

Parameters are synthetic and created on the device: no time depends on their values, except through the router, which
these load about evenly.
"""

import dataclasses
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.config import SphinxConfig, preset
from sphinx_jax.costs import Workload, decode_bytes, forward_flops
from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import bucket, prefill_tokens
from sphinx_jax.inference.programs import Programs, StateShape
from sphinx_jax.inference.sampling import GREEDY, SamplingArrays
from sphinx_jax.inference.stop_strings import FIRST, NUM_STATES
from sphinx_jax.kernels.quantized import QuantizedDtype
from sphinx_jax.memory_plan.aot import memory_analysis
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params, quantized
from sphinx_jax.training.program import TrainProgram, train_program
from sphinx_jax.training.train_config import ComputeDtype, TrainConfig
from sphinx_jax.training.train_state import init_state

DECODE_STEPS, PROMPT_LEN = 32, 223
"""Decode steps of one repetition, and filled cache positions before them: cache_len is 256, with the one after."""

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "tokenizer" / "tokenizer.model"

NO_LIMIT = 10**6
"""Of sampled tokens: no sequence ends."""


class Job(NamedTuple):
    """A run to time, and its roofline inputs."""

    run: Callable[[], None]
    tokens: int
    flops: float
    bytes: float
    """Bytes that must be read from device memory."""
    planned_bytes: int
    """Device memory, from the compiler's memory analysis."""


class OurModel:
    """A model with unstacked layers on one device, in `dtype`, with synthetic parameters."""

    def __init__(self, config: SphinxConfig, dtype: str):
        self.config, self.mesh, self.vocab_size = config, sharding.make_mesh(), config.language.vocab_size
        self.graph, self.abstract_params = sharding.abstract_params(
            lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), self.mesh, dtype=jnp.dtype(dtype)
        )
        self.params = synthetic_arrays(self.abstract_params)
        self._programs = Programs(config, self.graph, self.vocab_size, self.mesh, jnp.dtype(dtype))
        # No token leads to the state STOPPED.
        self._stops = jnp.full((NUM_STATES, self.vocab_size), FIRST, jnp.int16)

    def quantize(self, kind: QuantizedDtype) -> None:
        """Quantize the decoder's matrices."""

        def leaf(keys: tuple, leaf: jax.Array) -> Any:
            return quantized(tuple(key.key for key in keys), leaf, kind)

        self.params = jax.tree_util.tree_map_with_path(leaf, self.params)
        self.abstract_params = abstract_quantized_params(self.abstract_params, kind)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        args = (self.params, tokens, None)
        return np.asarray(self._programs.logits().compile(args, self.mesh)(*args))

    def prefill(self, tokens: np.ndarray, chunk_len: int | None = None) -> Job:
        """Prefill of prompts of one length, a multiple of `chunk_len` or less than it, by the engine's programs.

        `tokens` are [batch, length]; `chunk_len` is the engine's by default.
        """
        chunk_len = chunk_len or prefill_tokens(self.mesh)
        batch_size, length = tokens.shape
        shape = StateShape(batch_size, bucket(length))
        abstract = self._programs.abstract_state(shape)
        new_state = self._programs.new_state(shape).compile((), self.mesh)
        chunks = [self._chunk(tokens[:, start : start + chunk_len], start) for start in range(0, length, chunk_len)]

        def args(chunk: steps.Chunk, state: steps.State) -> tuple:
            return self.params, state, chunk, None, self._stops, np.False_

        programs = [self._programs.prefill(abstract, True).compile(args(chunks[0], abstract), self.mesh)]
        if len(chunks) > 1:
            chunked = self._programs.prefill(abstract, False)
            programs.append(chunked.compile(args(chunks[1], abstract), self.mesh))
        states: list[steps.State] = []

        def run() -> None:
            state = states.pop() if states else new_state()
            for i, chunk in enumerate(chunks):
                state, _ = programs[min(i, 1)](*args(chunk, state))
            states.append(jax.block_until_ready(state))

        # Causal attention: on average over a prompt's positions, half of its keys.
        work = Workload(batch_size, length, (length + 1) // 2, 1)
        flops = forward_flops(self.config, self.abstract_params, self.mesh, work)["language"].total
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params["language"]["layers"]))
        planned = max(memory_analysis(program).total for program in programs)
        return Job(run, batch_size * length, flops, weight_bytes, planned)

    def _chunk(self, tokens: np.ndarray, start: int) -> steps.Chunk:
        """A chunk of `tokens` [batch, length] that begins at cache position `start` of each batch slot."""
        batch_size, length = tokens.shape

        def integers(value: int) -> np.ndarray:
            return np.full(batch_size, value, np.int32)

        return steps.Chunk(
            slot=np.arange(batch_size, dtype=np.int32),
            tokens=tokens,
            length=integers(length),
            start=integers(start),
            source=integers(0),
            target=integers(0),
            last=np.ones(batch_size, bool),
            limit=integers(NO_LIMIT),
            stop=integers(FIRST),
            seeds=np.zeros((batch_size, 2), np.uint32),
            seen=np.zeros((batch_size, self.vocab_size), bool),
            sampling=SamplingArrays.of([GREEDY] * batch_size),
        )

    def decode(self, batch_size: int) -> Job:
        """DECODE_STEPS tokens for each of `batch_size` sequences."""
        cache_len = PROMPT_LEN + DECODE_STEPS + 1
        shape = StateShape(batch_size, cache_len)
        abstract = self._programs.abstract_state(shape)
        new_state = self._programs.new_state(shape).compile((), self.mesh)
        cancelled = np.zeros(batch_size, bool)
        first = {
            "length": np.full(batch_size, PROMPT_LEN, np.int32),
            "token": np.full(batch_size, 5, np.int32),
            "count": np.zeros(batch_size, np.int32),
            "limit": np.full(batch_size, NO_LIMIT, np.int32),
            "stop": np.full(batch_size, FIRST, np.int32),
            "done": np.zeros(batch_size, bool),
            "sampling": SamplingArrays.of([GREEDY] * batch_size),
        }

        def args(state: steps.State) -> tuple:
            """The state is reset: every repetition decodes at the same positions."""
            options = np.int32(DECODE_STEPS), np.int32(0), np.False_
            return self.params, state._replace(**first), cancelled, self._stops, *options

        program = self._programs.decode(abstract, cache_len).compile(args(abstract), self.mesh)
        states: list[steps.State] = []

        def run() -> None:
            state, _ = program(*args(states.pop() if states else new_state()))
            states.append(jax.block_until_ready(state))
            assert int(state.count[0]) == DECODE_STEPS

        keys = PROMPT_LEN + DECODE_STEPS // 2
        work = Workload(batch_size, 1, keys, 1)
        flops = forward_flops(self.config, self.abstract_params, self.mesh, work)["language"].total
        read_bytes = decode_bytes(self.config, self.abstract_params, self.mesh, batch_size, keys).total
        planned = memory_analysis(program).total
        return Job(run, batch_size * DECODE_STEPS, DECODE_STEPS * flops, DECODE_STEPS * read_bytes, planned)


class Step(NamedTuple):
    """A training step on a fixed batch."""

    run: Callable[[], None]
    program: TrainProgram
    compiled: jax.stages.Compiled


def training_step(config: SphinxConfig, tokens: np.ndarray, dtype: ComputeDtype, mesh: Mesh | None = None) -> Step:
    """Optimizer steps on the batch `tokens` [batch, length], on `mesh` or one device.

    `dtype` is the compute dtype; weights and moments are float32.
    """
    mesh = mesh or sharding.make_mesh()
    program = train_program(config, TrainConfig(batch_size=len(tokens), dtype=dtype), mesh)
    sharded = jax.device_put(tokens, sharding.named_sharding(("batch", None), tokens.shape, mesh))
    batch = {"tokens": sharded, "labels": sharded}
    compiled = program.step.compile((program.state, batch, {}), mesh)
    states = [init_state(synthetic_arrays(program.params), program.optimizer, mesh)]

    def run() -> None:
        states.append(jax.block_until_ready(compiled(states.pop(), batch, {})[0]))

    return Step(run, program, compiled)


def training(config: SphinxConfig, tokens: np.ndarray, dtype: ComputeDtype) -> Job:
    """The same as a Job."""
    (batch_size, length), step = tokens.shape, training_step(config, tokens, dtype)
    work = Workload(batch_size, length, (length + 1) // 2, length)
    forward = forward_flops(config, step.program.params["model"], sharding.make_mesh(), work)["language"]
    # The backward pass costs two forward passes.
    return Job(step.run, batch_size * length, 3 * forward.total, 0, memory_analysis(step.compiled).total)


def synthetic_arrays(abstract: Any) -> Any:
    """Arrays of the given shapes, dtypes and shardings: ones for vectors, else uniform of deviation 0.02."""

    def fill(salt: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        # Multiplicative hashing of the index: one kernel without temporaries, unlike jax.random.
        n = jax.lax.iota(jnp.uint32, math.prod(leaf.shape)) + salt
        n = (n ^ (n >> 15)) * jnp.uint32(2246822519)
        n = (n ^ (n >> 13)) * jnp.uint32(3266489917)
        uniform = (n >> 8).astype(jnp.float32) / 2**24 - 0.5
        return (0.02 * math.sqrt(12) * uniform).astype(leaf.dtype).reshape(leaf.shape)

    jit_fill = jax.jit(fill, static_argnums=1)
    leaves, structure = jax.tree.flatten(abstract)
    arrays = [jax.device_put(jit_fill(i * 40503, leaf), leaf.sharding) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def save_synthetic(name: str, directory: Path, formats: Sequence[str]) -> list[Path]:
    """Checkpoints of a preset's decoder with synthetic parameters, one for each format, in `directory`."""
    config = dataclasses.replace(preset(name), vision=None)
    params, assets = OurModel(config, "float32").params, {"tokenizer.model": TOKENIZER.read_bytes()}
    paths = [directory / format for format in formats]
    for path, format in zip(paths, formats, strict=True):
        checkpoints.save(path, config, params, assets, format=format)
    return paths


def machine() -> str:
    """CPU, kernel and huge pages, with which the ratios move."""

    def field(file: str, pattern: str) -> str:
        found = re.search(pattern, Path(file).read_text()) if Path(file).exists() else None
        return found[1] if found else "unknown"

    cpu = field("/proc/cpuinfo", r"model name\s*: (.*)")
    huge_pages = field("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]")
    return f"{cpu}, {os.cpu_count()} logical cores, {platform.system()} {platform.release()}, huge pages: {huge_pages}"


def time_once(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_after_idle(run: Callable[[], object]) -> float:
    """Seconds of one run, after the spinning worker threads of the other library have gone to sleep."""
    time.sleep(0.5)
    return time_once(run)
