"""How many sequences fit into memory at a time: `--max-num-seqs auto`.

memory of a device - parameters - temporaries of the largest programs - image embeddings >= state of n sequences
"""

import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import sharding
from sphinx_jax.config import DecoderConfig
from sphinx_jax.errors import UserError
from sphinx_jax.inference import warmup
from sphinx_jax.inference.bucketing import ChunkSizes
from sphinx_jax.inference.data_parallel import round_up_to_groups
from sphinx_jax.inference.engine import IMAGE_CACHE_BYTES, Engine
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.steps import abstract_state

NumSeqs = int | Literal["auto"]
"""A number of sequences, or as many as fit."""

MOST_ON_GPU = 256
"""More sequences than this share the reading of the weights already: a decode step computes for as long as it reads."""

MOST_ON_CPU = 64
"""A CPU computes for as long as it reads with far fewer."""

CPU_SHARE = 0.25
"""Of the host's memory, what the state may take: parameters and other programs are there too."""

GPU_SHARE = 0.95
"""Of the device memory that is free: the allocator loses some of it between arrays."""

STEP = 8
"""Numbers above it are multiples of it: a little less memory then needs no other programs."""


def max_num_seqs(free_bytes: int, state_bytes: Callable[[int], int], groups: int, most: int) -> int:
    """The largest number of sequences, up to `most`, whose state takes `free_bytes` or less on each device.

    A power of two or a multiple of STEP, for each of `groups`; `state_bytes` gives the bytes on each device of the
    state of so many sequences. Raises UserError if not even one for each group fits.
    """
    numbers = [1, 2, 4, *range(STEP, max(most // groups, 1) + 1, STEP)]
    fit = [n * groups for n in numbers if n * groups <= max(most, groups) and state_bytes(n * groups) <= free_bytes]
    if not fit:
        raise UserError(
            f"not one sequence fits: it needs {state_bytes(groups) / 2**30:.2f} GiB on each device and "
            f"{max(free_bytes, 0) / 2**30:.2f} GiB are free; use a shorter --max-model-len or --quantize"
        )
    return fit[-1]


def check_cache_fits(config: DecoderConfig, mesh: Mesh, dtype: str, sequences: int, positions: int) -> None:
    """Raises UserError if the KV cache alone exceeds the memory of a device, or of the host of a CPU.

    What is said here is said before the weights are read; that parameters and temporaries fit beside it is not.
    """
    sequences = round_up_to_groups(sequences, sharding.num_shards("batch", mesh))
    state = abstract_state(
        config, sequences, positions, 0, 0, dtype=jnp.dtype(dtype), mesh=mesh, rules=sharding.DEFAULT_RULES
    )
    needed, device = sharding.bytes_per_device(state), mesh.local_devices[0]
    stats = device.memory_stats() or {}
    there = stats.get("bytes_limit") or _host_bytes() // len(mesh.local_devices)
    if needed > there:
        raise UserError(
            f"the KV cache of {sequences} sequences of {positions} positions takes {needed / 2**30:.1f} GiB on each "
            f"device, which has {there / 2**30:.1f} GiB; use a shorter --max-model-len or a smaller --max-num-seqs"
        )


def usable_bytes(device: Any) -> int:
    """What may be allocated on a jax device in all: a share of its allocator's limit, or of the host's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] * GPU_SHARE)
    return int(_host_bytes() * CPU_SHARE) // jax.local_device_count()


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def num_seqs(engine: Engine, wanted: NumSeqs, shape_of: Callable[[int], StateShape], chunks: ChunkSizes) -> int:
    """`wanted`, or with "auto" as many sequences as the devices of `engine` have memory for.

    `shape_of` gives the shape of the state of so many sequences. A CPU gives a quarter of the host's memory, shared by
    its simulated devices. On a GPU the largest programs are compiled for what would fit without them, and their
    temporaries are taken off; nothing is run. All processes get the same number.
    """
    if wanted != "auto":
        return wanted

    def state_bytes(number: int) -> int:
        return engine.state_bytes(shape_of(number))

    device = engine.mesh.local_devices[0]
    if device.platform == "cpu":
        free = int(_host_bytes() * CPU_SHARE) // len(engine.mesh.local_devices)
        return max_num_seqs(sharding.least_of_processes(free), state_bytes, engine.groups, MOST_ON_CPU)
    stats = device.memory_stats()
    free = int((stats["bytes_limit"] - stats["bytes_in_use"]) * GPU_SHARE) - IMAGE_CACHE_BYTES - engine.reserved_bytes
    free = sharding.least_of_processes(free)
    candidate = max_num_seqs(free, state_bytes, engine.groups, MOST_ON_GPU)
    free -= warmup.working_bytes(engine, shape_of(candidate), chunks)
    return max_num_seqs(free, state_bytes, engine.groups, MOST_ON_GPU)
