"""Our side of the benchmarks: prompts read, words decoded and training steps taken by the programs that users run.

Weights are made up on the device: no time depends on their values, except through the router, which these keep busy
about evenly.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sharding
from sphinx_jax.config import SphinxConfig
from sphinx_jax.costs import Cost, Work, decode_bytes, forward_flops
from sphinx_jax.inference import steps
from sphinx_jax.inference.bucketing import bucket, prefill_tokens
from sphinx_jax.inference.programs import Programs
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.memory_plan.aot import memory_of
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.program import TrainProgram, train_program
from sphinx_jax.training.train_config import TrainConfig
from sphinx_jax.training.train_state import init_state

DECODED, MAX_MODEL_LEN = 32, 223
"""Tokens that a decoding repetition adds, and that stand in the cache before: 256 slots, with the one after."""


class Job(NamedTuple):
    """Something to time, with what it cannot do without."""

    run: Callable[[], None]
    tokens: int
    flops: float
    bytes: float
    """Read from memory at least."""
    planned_bytes: int
    """Of device memory, as the compiler says."""


class Ours:
    """A model with its layers apart on one device, in `dtype`."""

    def __init__(self, config: SphinxConfig, dtype: str):
        self.config, self.mesh, self.vocab = config, sharding.make_mesh(), config.language.vocab_size
        make = lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs)
        self.graph, self.abstract = sharding.abstract_params(make, self.mesh, dtype=jnp.dtype(dtype))
        self.params = made_up(self.abstract)
        self._programs = Programs(config, self.graph, self.vocab, self.mesh, jnp.dtype(dtype))
        self._sampling, self._stops = SamplingParams().values(), jnp.ones((32, self.vocab), jnp.int16)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        args = (self.params, tokens, None)
        return np.asarray(self._programs.logits().compile(args, self.mesh)(*args))

    def prefill(self, tokens: np.ndarray, piece: int | None = None) -> Job:
        """Prompts of one length, a multiple of `piece` or less than it, read as the engine reads them.

        `piece` is the engine's own unless given.
        """
        piece = piece or prefill_tokens(self.mesh)
        rows, length = tokens.shape
        empty = self._programs.abstract_state(rows, bucket(length))
        make = self._programs.new_state(rows, bucket(length)).compile((), self.mesh)
        each = lambda value, dtype=np.int32: np.full(rows, value, dtype)

        def chunk(first: int) -> steps.Chunk:
            part = tokens[:, first : first + piece]
            return steps.Chunk(
                row=np.arange(rows, dtype=np.int32),
                tokens=part,
                length=each(part.shape[1]),
                start=each(first),
                limit=each(10**6),
                seeds=np.zeros((rows, 2), np.uint32),
                seen=np.zeros((rows, self.vocab), bool),
            )

        chunks = [chunk(first) for first in range(0, length, piece)]
        args = lambda chunk, state: (self.params, state, chunk, None, self._sampling, self._stops)
        begin = self._programs.prefill(empty, True).compile(args(chunks[0], empty), self.mesh)
        programs = [begin]
        if len(chunks) > 1:
            programs.append(self._programs.prefill(empty, False).compile(args(chunks[1], empty), self.mesh))
        kept: list[steps.State] = []

        def run() -> None:
            state = kept.pop() if kept else make()
            for chunk in chunks:
                state = programs[min(chunk.start[0], 1)](*args(chunk, state))
            kept.append(jax.block_until_ready(state))

        # Looked at are, on average over a prompt's positions, half of its keys.
        work = Work(rows, length, (length + 1) // 2, 1)
        flops = forward_flops(self.config, self.abstract, self.mesh, work)["language"].total
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params["language"]["layers"]))
        return Job(run, rows * length, flops, weights, max(memory_of(program).total for program in programs))

    def decode(self, rows: int) -> Job:
        """DECODED tokens for each of `rows` answers."""
        slots = MAX_MODEL_LEN + DECODED + 1
        empty = self._programs.abstract_state(rows, slots)
        make = self._programs.new_state(rows, slots).compile((), self.mesh)
        each = lambda value, dtype=np.int32: np.full(rows, value, dtype)
        begun = {
            "length": each(MAX_MODEL_LEN),
            "token": each(5),
            "count": each(0),
            "limit": each(10**6),
            "stop": each(1),
        }
        begin = lambda state: state._replace(done=each(False, bool), **begun)
        args = lambda state: (self.params, state, self._sampling, self._stops, np.int32(DECODED), np.int32(0))
        program = self._programs.decode(empty).compile(args(begin(empty)), self.mesh)
        kept: list[steps.State] = []

        def run() -> None:
            state = kept.pop() if kept else make()
            kept.append(jax.block_until_ready(program(*args(begin(state)))))
            assert int(kept[0].count[0]) == DECODED

        one = Work(rows, 1, MAX_MODEL_LEN + DECODED // 2, 1)
        flops = forward_flops(self.config, self.abstract, self.mesh, one)["language"].total
        read = decode_bytes(self.config, self.abstract, self.mesh, rows, MAX_MODEL_LEN + DECODED // 2).total
        return Job(run, rows * DECODED, DECODED * flops, DECODED * read, memory_of(program).total)


class Step(NamedTuple):
    """A training step on a batch that stays the same."""

    run: Callable[[], None]
    program: TrainProgram
    compiled: jax.stages.Compiled


def training_step(config: SphinxConfig, tokens: np.ndarray, dtype: str, mesh: Mesh | None = None) -> Step:
    """Optimizer steps on one batch, computing in `dtype`, on `mesh` or one device; weights and moments are float32."""
    mesh = mesh or sharding.make_mesh()
    program = train_program(config, TrainConfig(steps=1000, batch_size=len(tokens), dtype=dtype), mesh)
    step = sharding.Program(program.step, (0,), rules=program.rules, slices_in_place=True)
    placed = jax.device_put(tokens, sharding.named_sharding(("batch", None), tokens.shape, mesh))
    batch = {"tokens": placed, "labels": placed}
    compiled = step.compile((program.state, batch), mesh)
    kept = [init_state(made_up(program.params), program.optimizer, mesh)]

    def run() -> None:
        kept.append(jax.block_until_ready(compiled(kept.pop(), batch)[0]))

    return Step(run, program, compiled)


def training(config: SphinxConfig, tokens: np.ndarray, dtype: str) -> Job:
    """The same as something to time beside others."""
    (rows, length), step = tokens.shape, training_step(config, tokens, dtype)
    work = Work(rows, length, (length + 1) // 2, length)
    forward: Cost = forward_flops(config, step.program.params["model"], sharding.make_mesh(), work)["language"]
    # A backward pass is twice a forward one.
    return Job(step.run, rows * length, 3 * forward.total, 0, memory_of(step.compiled).total)


def made_up(abstract: Any) -> Any:
    """Arrays of the shapes, dtypes and places given: vectors of ones, all else evenly spread and of deviation 0.02."""

    def fill(salt: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        # Multiplicative hashing of the index: one kernel with no memory of its own, unlike jax.random.
        n = jax.lax.iota(jnp.uint32, math.prod(leaf.shape)) + salt
        n = (n ^ (n >> 15)) * jnp.uint32(2246822519)
        n = (n ^ (n >> 13)) * jnp.uint32(3266489917)
        even = (n >> 8).astype(jnp.float32) / 2**24 - 0.5
        return (0.02 * math.sqrt(12) * even).astype(leaf.dtype).reshape(leaf.shape)

    drawn = jax.jit(fill, static_argnums=1)
    leaves, structure = jax.tree.flatten(abstract)
    made = [jax.device_put(drawn(i * 40503, leaf), leaf.sharding) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, made)


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rested(run: Callable[[], object]) -> float:
    """Seconds that it takes once threads of the other side, which wait for more by spinning, have gone to sleep."""
    time.sleep(0.5)
    return clock(run)
