"""The recently used experts of each layer on the devices; all experts are in host memory.

Which ones a layer needs is known when its router has run. Those that are kept compute first, while the others are
copied. Routing of Mixtral is close to uniform: of 8 experts the k used last are hit k / 8 of the time, and a better
guess than the least recently used one was not found (docs/quantization-and-offload.md).
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

import sharding

SPARE = 2
"""Experts on the devices besides those that are kept, while a layer runs: one computes, the next one is copied."""

Expert = Any
"""The matrices of one expert: a tree of arrays, or of abstract ones."""
Result = TypeVar("Result")


def experts_that_fit(free_bytes: int, expert_bytes: int, num_experts: int) -> int:
    """How many of `num_experts` experts can be kept in `free_bytes`: SPARE places are left for copies, unless all can
    be kept.
    """
    places = max(free_bytes, 0) // expert_bytes
    return num_experts if places >= num_experts else max(places - SPARE, 0)


def best_fit(free_bytes: int, expert_bytes: int, num_experts: int, encoder_bytes: int) -> tuple[int, bool]:
    """(experts that can be kept, whether the encoders go to host memory for that). `encoder_bytes` are theirs on the
    devices, which `free_bytes` does not count.
    """
    beside = experts_that_fit(free_bytes, expert_bytes, num_experts)
    instead = experts_that_fit(free_bytes + encoder_bytes, expert_bytes, num_experts)
    return instead, instead > beside


def quotas(kept: int, num_layers: int) -> list[int]:
    """How many experts each layer keeps of `kept` in all: as many, or one more in the first layers.

    A least recently used list over all layers would keep nothing if it held less than one token's experts: layers run
    in a cycle, and it drops what is needed next.
    """
    each, more = divmod(kept, num_layers)
    return [each + (i < more) for i in range(num_layers)]


def expected_copies(tokens: int, kept: int, num_layers: int, num_experts: int, experts_per_token: int) -> float:
    """Experts that a decode step of `tokens` sequences copies on average, if each selects its experts uniformly and
    independently.

    An expert that somebody selects is then among the q that its layer keeps with a probability of q / num_experts,
    whichever they are.
    """
    selected = num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens)
    return sum(selected * (1 - quota / num_experts) for quota in quotas(kept, num_layers))


class ExpertCache:
    """`experts[layer][i]` in host memory, the last used of each layer on the devices.

    Invariants: between calls of `compute` at most `kept` experts are on the devices, each layer's `quotas` of them;
    during a call at most SPARE more. An expert's memory is free when its last computation has ended, so whoever
    calls must have read something on the host that depends on the result before the next call: the choice of the next
    layer's experts does.
    """

    def __init__(self, experts: Sequence[Sequence[Expert]]):
        self._experts = experts
        self._on_device = [collections.OrderedDict[int, Expert]() for _ in experts]
        """By layer and number, the least recently used first."""
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), experts[0][0])
        self.expert_bytes = sharding.bytes_per_device(experts[0][0])
        """Of one expert, on each device. All are equal, so that the allocator's memory does not fragment."""
        self.kept = 0
        self._quotas = [0] * len(experts)
        self.hits = 0
        self.misses = 0

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return sum(map(len, self._experts))

    @property
    def bytes_copied(self) -> int:
        """To each device, so far."""
        return self.misses * self.expert_bytes

    @property
    def device_bytes(self) -> int:
        """On each device, now."""
        return sum(map(len, self._on_device)) * self.expert_bytes

    @property
    def abstract_expert(self) -> Expert:
        """Shapes and shardings of an expert on the devices."""

        def abstract(leaf: Any, on_device: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device)

        return jax.tree.map(abstract, self._experts[0][0], self._shardings)

    def resize(self, kept: int) -> None:
        """Keep so many experts in all from now on; others are dropped now. Not during `compute`."""
        self.kept, self._quotas = kept, quotas(kept, len(self._experts))
        for layer in range(len(self._experts)):
            self._drop(layer)

    def compute(
        self, layer: int, selected: Sequence[int], run: Callable[[int, Expert, Result], Result], x: Result
    ) -> Result:
        """x = run(i, expert i, x) for each selected expert of a layer, those first that need not be copied.

        `run` only starts a computation. Copies are started before the computations that they overlap with: XLA makes a
        copy wait for what was started before it.
        """
        on_device = self._on_device[layer]
        copies = collections.deque(i for i in selected if i not in on_device)
        order = [i for i in selected if i in on_device] + list(copies)
        self.hits += len(order) - len(copies)
        self.misses += len(copies)
        for done, i in enumerate(order):
            self._start_copies(layer, copies, order[:done], order[done:], x)
            x = run(i, on_device[i], x)
            on_device.move_to_end(i)
        self._drop(layer)
        return x

    def _start_copies(
        self, layer: int, copies: collections.deque[int], done: Sequence[int], needed: Sequence[int], x: Any
    ) -> None:
        """Start as many copies as there are places for; `x` depends on the experts that are `done`."""
        on_device = self._on_device[layer]
        while copies:
            if len(on_device) >= self._quotas[layer] + SPARE:
                oldest = next((i for i in on_device if i not in needed), None)
                if oldest is None:
                    return
                if oldest in done:
                    jax.block_until_ready(x)
                del on_device[oldest]
            i = copies.popleft()
            on_device[i] = jax.device_put(self._experts[layer][i], self._shardings)

    def _drop(self, layer: int) -> None:
        """Drop the experts of a layer that are over its quota, the least recently used first."""
        while len(self._on_device[layer]) > self._quotas[layer]:
            self._on_device[layer].popitem(last=False)
