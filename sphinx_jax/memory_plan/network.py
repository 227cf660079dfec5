"""The communication of a program by mesh axes: what GPUs send inside a host, and what leaves it.

Device i of the flattened mesh is on host i // gpus_per_host. Collectives are rings, as NCCL's for large messages: of a
group of n devices each sends (n - 1) / n of the bytes to the next device, and twice that for an all-reduce
(nccl-tests, PERFORMANCE.md). Where the group spans hosts, the ring leaves each host once.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sphinx_jax.memory_plan.hlo import Collective

NETWORK_GBIT_S = 400.0
"""Gigabits per second that a host sends: one adapter of 400 Gb/s. With eight of them times are an eighth."""


@dataclasses.dataclass(frozen=True)
class Communication:
    """Communication along the mesh `axes` in one run of a program.

    `sent_bytes` are those that a GPU sends, on its host or past it; `cross_host_bytes` those that leave the host that
    sends most of them. `seconds` is the least time: over the network what leaves the host, or over the GPU's link.
    """

    axes: tuple[str, ...]
    sent_bytes: int
    cross_host_bytes: int
    seconds: float


def communication(
    found: Sequence[Collective], mesh: Mapping[str, int], gpus_per_host: int, link_bandwidth: float
) -> list[Communication]:
    """Collectives by mesh axes, the longest first. `link_bandwidth`: bytes/s from a GPU to others of its host."""
    sent: dict[tuple[str, ...], float] = collections.defaultdict(float)
    crossing: dict[tuple[str, ...], float] = collections.defaultdict(float)
    for collective in found:
        groups = _groups(collective.axes, mesh)
        sent[collective.axes] += _sent(collective, groups.shape[1])
        crossing[collective.axes] += _cross_host(collective, groups // gpus_per_host)
    network = NETWORK_GBIT_S * 1e9 / 8
    rows = [
        Communication(
            axes, round(sent[axes]), round(leaving), leaving / network if leaving else sent[axes] / link_bandwidth
        )
        for axes, leaving in crossing.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _groups(axes: tuple[str, ...], mesh: Mapping[str, int]) -> np.ndarray:
    """Integer[groups, group size]: the devices that communicate along the axes."""
    names = list(mesh)
    devices = np.arange(np.prod(list(mesh.values()))).reshape(list(mesh.values()))
    last = np.moveaxis(devices, [names.index(axis) for axis in axes], range(-len(axes), 0))
    return last.reshape(-1, np.prod([mesh[axis] for axis in axes]))


def _sent(collective: Collective, size: int) -> float:
    """Bytes that each of `size` devices sends. Of a permutation, all of its input."""
    if collective.kind == "collective-permute":
        return collective.bytes
    return collective.bytes * (2 if collective.kind == "all-reduce" else 1) * (size - 1) / size


def _cross_host(collective: Collective, hosts: np.ndarray) -> float:
    """Bytes that leave the host that sends most; `hosts` are those of the devices of each group."""
    leaving = np.zeros(hosts.max() + 1)
    for group in hosts:
        for host, members in zip(*np.unique(group, return_counts=True), strict=True):
            others = len(group) - members
            if others and "all-to-all" in collective.kind:
                leaving[host] += collective.bytes * members * others / len(group)
            elif others:
                leaving[host] += _sent(collective, len(group))
    return float(leaving.max())
