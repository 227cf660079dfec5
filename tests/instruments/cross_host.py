"""Bytes that leave a host in one run of a compiled program, counted hop by hop from the replica groups of its text.

Nothing here is shared with `sphinx_jax.memory_plan.hlo`, whose counts it checks.
"""

import collections
import math
import re

_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64}
_COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*?)\)")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+).*\"known_trip_count\":\{\"n\":\"(\d+)\"\}")
_CALL = re.compile(r" (?:call|conditional|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)")


def bytes_out_of_a_host(text: str, gpus_per_host: int) -> float:
    """Of the host that sends most, by rings in the order of the replica groups."""
    computations = _computations(text)
    leaving: dict[int, float] = collections.defaultdict(float)
    (entry,) = (name for name in computations if name.startswith("ENTRY"))

    def count(name: str, times: int) -> None:
        types = dict(re.findall(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ", "\n".join(computations[name]), re.M))
        for line in computations[name]:
            if loop := _WHILE.search(line):
                count(loop[1], times * int(loop[2]))
            elif call := _CALL.search(line):
                count(call[1], times)
            elif found := _COLLECTIVE.search(line):
                size = sum(_bytes(types[operand]) for operand in re.findall(r"%([\w.\-]+)", found[2]))
                for group in _groups(line):
                    # A ring passes through one host after the other.
                    _send(found[1], times * size, sorted(group), gpus_per_host, leaving)

    count(entry, 1)
    return max(leaving.values(), default=0)


def _send(kind: str, size: int, group: list[int], gpus_per_host: int, leaving: dict[int, float]) -> None:
    """Add what leaves each host when every device of the group has `size` bytes."""
    n = len(group)
    for i, device in enumerate(group):
        for distance in range(1, n):
            host, target = device // gpus_per_host, group[(i + distance) % n] // gpus_per_host
            if host == target:
                continue
            if kind == "all-to-all":
                leaving[host] += size / n
            elif distance == 1:
                leaving[host] += size * {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation, by its name; the entry's name begins with ENTRY."""
    found, current = {}, []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault((header[1] or "") + header[2], [])
        current.append(line)
    return found


def _bytes(types: str) -> int:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * _BITS[dtype] // 8 for dtype, dims in arrays)


def _groups(line: str) -> list[list[int]]:
    """Of a list of groups, of the names of mesh axes, or of an iota that is reshaped, transposed and reshaped again."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}:]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        names = re.findall(r"'(\w+)'", named[2])
        inside, others = ([i for i, name in enumerate(sizes) if (name in names) == chosen] for chosen in (True, False))
        return _iota(list(sizes.values()), others + inside, math.prod(sizes[name] for name in names))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert iota, line
    dims = [int(n) for n in iota[3].split(",")]
    order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(dims)))
    return _iota(dims, order, int(iota[2]))


def _iota(dims: list[int], order: list[int], size: int) -> list[list[int]]:
    """The numbers from 0 on in an array of `dims`, its dimensions in another order, in groups of `size`."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    devices = [0]
    for dim in order:
        devices = [device + index * strides[dim] for device in devices for index in range(dims[dim])]
    return [devices[i : i + size] for i in range(0, len(devices), size)]
