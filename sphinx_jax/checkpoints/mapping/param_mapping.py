"""The mapping between one published tensor and one block of a parameter.

Every published layout is a list of mappings, pure data, used in both directions: loading fills blocks of
parameters from views of files, saving extracts the blocks again.
"""

import dataclasses
import math

import numpy as np

Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class ParamMapping:
    """`params[path][index] == published[name].reshape(view).transpose(order)`, element by element.

    `view` splits, adds or drops dimensions in memory order only. `order` permutes them; a tuple of several in it
    merges them into one dimension of the parameter, slowest first. `shard_dim` is the dimension of `view` that a
    sharded file set divides, None for a tensor that is replicated in every shard. `expert` = (i, n): this is the
    i-th of n tensors of one shape, assigned to the shards in contiguous runs.
    Integers in `index` select and drop a dimension of the parameter (the layer of a stack); dimensions beyond
    `index` are taken completely.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str | int, ...]
    index: Index
    view: tuple[int, ...]
    order: tuple[int | tuple[int, ...], ...]
    shard_dim: int | None = None
    expert: tuple[int, int] | None = None
    dtype: str | None = None
    """That the tensor must have and keeps; None: any of floating-point numbers, which may be converted."""

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The dimensions of `view` that make up each dimension of the block."""
        return tuple(part if isinstance(part, tuple) else (part,) for part in self.order)

    @property
    def flat_order(self) -> tuple[int, ...]:
        """`order` without its grouping."""
        return tuple(dim for group in self.groups for dim in group)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of `params[path][index]`."""
        return tuple(math.prod(self.view[dim] for dim in group) for group in self.groups)

    def to_param(self, published: np.ndarray) -> np.ndarray:
        """The parameter's block; a view of the input where the memory layout allows."""
        return published.reshape(self.view).transpose(self.flat_order).reshape(self.block_shape)

    def to_published(self, block: np.ndarray) -> np.ndarray:
        """Inverse of `to_param`."""
        return self.in_view_order(block).reshape(self.shape)

    def in_view_order(self, block: np.ndarray, sizes: tuple[int, ...] | None = None) -> np.ndarray:
        """The block as an array with the dimensions of `view`; shares the block's memory.

        `sizes`: the extents along each dimension of `view`, for a part of the block.
        """
        sizes = self.view if sizes is None else sizes
        return block.reshape([sizes[dim] for dim in self.flat_order]).transpose(np.argsort(self.flat_order))

    def shard_view(self, shards: int) -> tuple[int, ...]:
        """`view` of one shard of `shards`. Raises ValueError if they do not divide it."""
        if self.shard_dim is None:
            return self.view
        size = self.view[self.shard_dim]
        if size % shards:
            raise ValueError(f"dimension {self.shard_dim} of {self.view} does not divide into {shards} shards")
        return (*self.view[: self.shard_dim], size // shards, *self.view[self.shard_dim + 1 :])

    def shard_shape(self, shards: int) -> tuple[int, ...]:
        """`shape` of one shard of `shards`: the published dimension that contains `shard_dim` is divided."""
        view = self.shard_view(shards)
        if self.shard_dim is None or view == self.view:
            return self.shape
        upto = math.prod(self.view[: self.shard_dim + 1])
        dim = next(d for d in range(len(self.shape)) if math.prod(self.shape[: d + 1]) >= upto)
        return (*self.shape[:dim], self.shape[dim] // shards, *self.shape[dim + 1 :])

    def expert_shard(self, shards: int) -> int:
        """The shard that holds this `expert`. Raises ValueError if `shards` does not divide the experts."""
        if self.expert is None:
            raise ValueError(f"{self.name} belongs to no expert")
        item, count = self.expert
        if count % shards:
            raise ValueError(f"{count} experts do not divide into {shards} shards")
        return item * shards // count
