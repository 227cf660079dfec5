"""Endless batches, prepared in background threads, deterministic for a seed and resumable."""

from collections.abc import Callable

import grain
import numpy as np
from jaxtyping import Int

Batch = dict[str, np.ndarray]


def batches(
    count: int,
    make_batch: Callable[[Int[np.ndarray, "batch"], np.random.Generator], Batch],
    batch_size: int,
    seed: int,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator over `make_batch(indices, random)`: every index below `count` once an epoch, reshuffled.

    `random` depends on the seed (0 or more) and the position alone, so the same seed gives the same batches.
    """
    shuffled = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    return prefetch(shuffled.batch(batch_size).random_map(make_batch), threads=1)


def prefetch(dataset: grain.MapDataset[Batch], threads: int) -> grain.DatasetIterator[Batch]:
    """Iterates with `threads` that prefetch two batches each; more threads than needed take cores from training.

    `get_state()` of the iterator is its position, for a checkpoint; `set_state()` continues there.
    """
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))
