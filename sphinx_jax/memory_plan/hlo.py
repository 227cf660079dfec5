"""Reading a compiled program: its collectives by mesh axis, and the values it writes to memory."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

_ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange among the devices along `axes`, `count` times a run of the program.

    `bytes` is of all `count` together: what one device puts in or gets out, whichever is more.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    type: str
    operands: str
    attributes: str
    root: bool = False
    """Whether it gives its computation's result."""

    @property
    def bytes(self) -> int:
        return type_bytes(self.type)

    @property
    def operand_names(self) -> tuple[str, ...]:
        """Names of the instructions that it takes; none for a parameter or a constant."""
        return () if self.opcode in ("parameter", "constant") else tuple(_OPERAND.findall(self.operands))


Computations = dict[str, list[Instruction]]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")


def parse(text: str) -> tuple[Computations, str]:
    """The computations of a program in HLO's text form, and the name of the one where it begins."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            kind, rest = _split_type(found[3])
            if opcode := _OPCODE.match(rest):
                operands, attributes = _split_parentheses(rest[opcode.end() - 1 :])
                current.append(Instruction(found[2], opcode[1], kind, operands, attributes, bool(found[1])))
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """A type, which may be a tuple of types, and what follows it."""
    if text.startswith("("):
        inside, rest = _split_parentheses(text)
        return f"({inside})", rest.lstrip()
    kind, _, rest = text.partition(" ")
    return kind, rest


def _split_parentheses(text: str) -> tuple[str, str]:
    """What the parenthesis at the start of `text` holds, and what follows it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[1:i], text[i + 1 :]
    return text[1:], ""


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def type_bytes(kind: str) -> int:
    """Bytes of all arrays of a type."""
    return sum(_array_bytes(item, dims) for item, dims in _ARRAY.findall(kind))


def _array_bytes(item: str, dims: str) -> int:
    return math.prod(map(int, filter(None, dims.split(",")))) * _ITEM_BITS.get(item, 0) // 8


_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def called(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction runs: a kernel's inside, a loop's condition and body, branches."""
    return [name for names in _CALLED.findall(instruction.attributes) for name in re.findall(r"[\w.\-]+", names)]


def rounds(instruction: Instruction) -> int:
    """How often what it calls runs: a loop's number of rounds if the program says it, else 1."""
    trips = _TRIPS.search(instruction.attributes) if instruction.opcode == "while" else None
    return int(trips[1]) if trips else 1


def executed(computations: Computations, entry: str) -> Iterator[tuple[Instruction, int]]:
    """Each instruction that runs by itself, and how often in one run of the program.

    The body of a loop whose number of rounds is not known counts once. What is inside a fused kernel is left out:
    of a kernel only the fusion instruction itself, with its result, is seen.
    """
    for instruction in computations.get(entry, []):
        yield instruction, 1
        if instruction.opcode in ("fusion", "reduce", "sort", "scatter", "reduce-window", "all-reduce-start"):
            continue
        for name in called(instruction):
            for inner, count in executed(computations, name):
                yield inner, count * rounds(instruction)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The exchanges in a program compiled for `mesh`, most bytes first."""
    counts: dict[tuple[str, tuple[str, ...]], list[int]] = collections.defaultdict(lambda: [0, 0])
    for instruction, times in executed(*parse(text)):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _KINDS:
            continue
        groups = _groups(instruction.attributes, mesh.size)
        total = counts[kind, _axes(groups, mesh)]
        total[0] += times
        total[1] += times * _exchanged(kind, instruction, len(groups[0]))
    found = [Collective(kind, axes, count, size) for (kind, axes), (count, size) in counts.items() if axes]
    return sorted(found, key=lambda c: -c.bytes)


def _exchanged(kind: str, instruction: Instruction, group: int) -> int:
    """Bytes that one device puts in or gets out."""
    if instruction.opcode.endswith("-start") and (kind != "all-reduce" or instruction.type.startswith("((")):
        # The type is a pair of what goes in and what comes out; of a sum not so with jax 0.10.
        return max(map(type_bytes, _split_pair(instruction.type[1:-1])))
    return instruction.bytes * (group if kind == "reduce-scatter" else 1)


def _split_pair(text: str) -> tuple[str, str]:
    """The two halves of a tuple of two, each of which may be a tuple."""
    if text.startswith("("):
        first, rest = _split_parentheses(text)
        return first, rest
    arrays = [match.group(0) for match in _ARRAY.finditer(text)]
    half = len(arrays) // 2
    return " ".join(arrays[:half]), " ".join(arrays[half : 2 * half])


_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Which devices exchange with each other; numbers are places in the flattened mesh."""
    numbers = lambda text: [int(n) for n in text.split(",")] if text else []
    if found := _EXPLICIT.search(attributes) or _PAIRS.search(attributes):
        return [numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := _IOTA.search(attributes):
        shape, order = numbers(found[2]), numbers(found[3] or "")
        ids = np.arange(math.prod(shape)).reshape(shape)
        return (ids.transpose(order) if order else ids).reshape(numbers(found[1])).tolist()
    if found := _NAMED.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = np.arange(devices)
        if found[2]:
            shape, order = numbers(found[2]), numbers(found[3] or "")
            ids = ids.reshape(shape)
            ids = ids.transpose(order) if order else ids
        return _named_groups(ids.reshape(-1), sizes, found[4])
    return [list(range(devices))]


def _named_groups(ids: np.ndarray, sizes: dict[str, int], wanted: str) -> list[list[int]]:
    """Groups along named axes of a mesh; 'a':(2)4 is the part of axis a with 2 before it and of size 4."""
    dims, inside = [], []
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", wanted)}
    for name, size in sizes.items():
        before, part = parts.get(name, (None, None))
        if part:
            pieces = [int(before), int(part), size // int(before) // int(part)]
            inside += [len(dims) + 1]
            dims += pieces
        else:
            inside += [len(dims)] if name in parts else []
            dims.append(size)
    outside = [i for i in range(len(dims)) if i not in inside]
    group = math.prod(dims[i] for i in inside)
    return ids.reshape(dims).transpose(outside + inside).reshape(-1, group).tolist()


def _axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which devices of one group differ."""
    shape = tuple(mesh.shape.values())
    places = [np.array(np.unravel_index(group, shape)) for group in groups]
    differ = np.any([place.min(axis=1) != place.max(axis=1) for place in places], axis=0)
    return tuple(name for name, yes in zip(mesh.axis_names, differ, strict=True) if yes)


_ALIASES = (
    "parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "optimization-barrier",
    "all-reduce-done", "all-gather-done", "collective-permute-done", "async-done", "async-update", "copy-done",
)  # fmt: skip


def largest_values(text: str, at_least: int) -> list[tuple[int, str]]:
    """(bytes, instruction) of each value of `at_least` bytes that the program writes to memory, largest first.

    What only names memory that is there already (parameters, tuples, loops) is left out. A copy of weights
    shows here whatever instruction makes it.
    """
    found = [
        (size, f"{instruction.opcode} {instruction.name}")
        for instruction, _ in executed(*parse(text))
        if instruction.opcode not in _ALIASES and (size := instruction.bytes) >= at_least
    ]
    return sorted(set(found), reverse=True)
