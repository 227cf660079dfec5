"""How one published tensor and one of our parameters stand to each other.

Every foreign layout is a list of entries, pure data, read in both directions: loading fills blocks of
our parameters from views of files, exporting takes the blocks out again.
"""

import dataclasses
import math

import numpy as np

Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class ParamMapping:
    """ours[path][index] == published[name].reshape(view).transpose(order), for every element.

    `view` only splits or drops-and-adds dimensions in memory order; `order` permutes them, and a tuple of
    several in it makes one dimension of ours out of them, slowest first. `split` is the dimension of `view`
    that a sharded file set divides, or None for a tensor that every shard holds whole. `member` = (i, n)
    instead says that this is the i-th of n like tensors, dealt out whole to the shards in runs.
    Integers in `index` select, and drop, a dimension of ours (the layer of a stack); dimensions that it does
    not reach are taken whole.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str | int, ...]
    index: Index
    view: tuple[int, ...]
    order: tuple[int | tuple[int, ...], ...]
    split: int | None = None
    member: tuple[int, int] | None = None

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
        """Shape of ours[path][index]."""
        return tuple(math.prod(self.view[dim] for dim in group) for group in self.groups)

    def to_ours(self, published: np.ndarray) -> np.ndarray:
        """The block of our parameter; a view of the input where memory allows."""
        return published.reshape(self.view).transpose(self.flat_order).reshape(self.block_shape)

    def to_published(self, block: np.ndarray) -> np.ndarray:
        """Inverse of `to_ours`."""
        return self.in_view_order(block).reshape(self.shape)

    def in_view_order(self, block: np.ndarray, sizes: tuple[int, ...] | None = None) -> np.ndarray:
        """The block with the dimensions of `view`, in its order, as a view of the block.

        For a part of the block, `sizes` gives its extent along each dimension of `view`.
        """
        sizes = self.view if sizes is None else sizes
        return block.reshape([sizes[dim] for dim in self.flat_order]).transpose(np.argsort(self.flat_order))

    def shard_view(self, shards: int) -> tuple[int, ...]:
        """`view` of one of `shards` equal parts. Raises ValueError if they do not divide it."""
        if self.split is None:
            return self.view
        size = self.view[self.split]
        if size % shards:
            raise ValueError(f"dimension {self.split} of {self.view} does not divide into {shards} shards")
        return (*self.view[: self.split], size // shards, *self.view[self.split + 1 :])

    def shard_shape(self, shards: int) -> tuple[int, ...]:
        """`shape` of one of `shards` equal parts: the published dimension that `split` lies in is divided."""
        view = self.shard_view(shards)
        if view == self.view:
            return self.shape
        upto = math.prod(self.view[: self.split + 1])
        dim = next(d for d in range(len(self.shape)) if math.prod(self.shape[: d + 1]) >= upto)
        return (*self.shape[:dim], self.shape[dim] // shards, *self.shape[dim + 1 :])

    def owner(self, shards: int) -> int:
        """The shard of `shards` that holds this `member`. Raises ValueError if runs would be uneven."""
        item, count = self.member
        if count % shards:
            raise ValueError(f"{count} experts cannot be dealt out evenly to {shards} shards")
        return item * shards // count
