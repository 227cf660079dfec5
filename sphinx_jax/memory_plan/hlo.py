"""Parse the HLO text of a compiled program: its instructions, and its collectives by mesh axis."""

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
    """One kind of collective along the mesh `axes`, executed `count` times in one run of the program.

    `bytes` is the sum over all `count`: the larger of input and output on one device.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction: `name = type opcode(operands), attributes`."""

    name: str
    opcode: str
    type: str
    operands: str
    attributes: str
    root: bool = False
    """Whether it is the root, the result of its computation."""

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return type_bytes(self.type)

    @property
    def operand_names(self) -> tuple[str, ...]:
        """Names of the instructions that are operands; none for a parameter or a constant."""
        return () if self.opcode in ("parameter", "constant") else tuple(_OPERAND.findall(self.operands))


Computations = dict[str, list[Instruction]]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")


def parse(text: str) -> tuple[Computations, str]:
    """The computations of a program in HLO text form, and the name of the entry computation."""
    computations: Computations = {}
    entry, current = "", None
    # A computation is a header line, indented instructions and a closing brace.
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            result_type, rest = _split_type(match[3])
            if opcode := _OPCODE.match(rest):
                operands, attributes = _split_parentheses(rest[opcode.end() - 1 :])
                current.append(Instruction(match[2], opcode[1], result_type, operands, attributes, bool(match[1])))
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """A type, which may be a tuple of types, and the text after it."""
    if text.startswith("("):
        inside, rest = _split_parentheses(text)
        return f"({inside})", rest.lstrip()
    array_type, _, rest = text.partition(" ")
    return array_type, rest


def _split_parentheses(text: str) -> tuple[str, str]:
    """The text inside the parenthesis at the start of `text`, and the text after it."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[1:i], text[i + 1 :]
    return text[1:], ""


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def type_bytes(hlo_type: str) -> int:
    """Bytes of all arrays of a type, such as `(bf16[2,3]{1,0}, s32[])`."""
    return sum(_array_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(hlo_type))


def array_shapes(hlo_type: str) -> list[tuple[int, ...]]:
    """The shapes of all arrays of a type."""
    return [tuple(_integers(dims)) for _, dims in _ARRAY.findall(hlo_type)]


def _array_bytes(dtype: str, dims: str) -> int:
    return math.prod(map(int, filter(None, dims.split(",")))) * _ITEM_BITS.get(dtype, 0) // 8


_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def called_computations(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction calls: of a fusion, a loop's condition and body, branches."""
    return [name for names in _CALLED.findall(instruction.attributes) for name in re.findall(r"[\w.\-]+", names)]


def trip_count(instruction: Instruction) -> int:
    """How often its called computations run: the known trip count of a loop, else 1."""
    trips = _TRIPS.search(instruction.attributes) if instruction.opcode == "while" else None
    return int(trips[1]) if trips else 1


def executed_instructions(computations: Computations, entry: str) -> Iterator[tuple[Instruction, int]]:
    """Each instruction that is launched, and how often in one run of the program.

    The body of a loop with an unknown trip count counts once. Instructions inside a fusion are left out: a fused
    kernel is one instruction, the fusion, with its result.
    """
    for instruction in computations.get(entry, []):
        yield instruction, 1
        if instruction.opcode in ("fusion", "reduce", "sort", "scatter", "reduce-window", "all-reduce-start"):
            continue
        for name in called_computations(instruction):
            for inner, count in executed_instructions(computations, name):
                yield inner, count * trip_count(instruction)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a program compiled for `mesh`, most bytes first."""
    # (kind, axes) -> count, bytes
    totals: dict[tuple[str, tuple[str, ...]], list[int]] = collections.defaultdict(lambda: [0, 0])
    for instruction, count in executed_instructions(*parse(text)):
        # An asynchronous collective is a -start and a -done instruction.
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _KINDS:
            continue
        groups = _replica_groups(instruction.attributes, mesh.size)
        total = totals[kind, _axes(groups, mesh)]
        total[0] += count
        total[1] += count * _collective_bytes(kind, instruction, len(groups[0]))
    # Without axes: groups of one device, which communicate nothing.
    found = [Collective(kind, axes, count, size) for (kind, axes), (count, size) in totals.items() if axes]
    return sorted(found, key=lambda c: -c.bytes)


def _collective_bytes(kind: str, instruction: Instruction, group_size: int) -> int:
    """The larger of input and output of one collective on one device, in bytes."""
    if instruction.opcode.endswith("-start") and (kind != "all-reduce" or instruction.type.startswith("((")):
        # The type is the pair (input, output), except of an all-reduce in jax 0.10, where it is the output.
        return max(map(type_bytes, _split_pair(instruction.type[1:-1])))
    return instruction.bytes * (group_size if kind == "reduce-scatter" else 1)


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


def _integers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def _replica_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The groups of devices that communicate; devices are indices into the flattened mesh."""
    if match := _EXPLICIT.search(attributes) or _PAIRS.search(attributes):
        return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := _IOTA.search(attributes):
        # [groups,size]<=[dims]T(permutation): an iota of shape `dims`, transposed, then reshaped.
        dims = _integers(match[2])
        devices = np.arange(math.prod(dims)).reshape(dims)
        devices = devices.transpose(_integers(match[3])) if match[3] else devices
        return devices.reshape(_integers(match[1])).tolist()
    if match := _NAMED.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        devices = np.arange(num_devices)
        if match[2]:
            devices = devices.reshape(_integers(match[2]))
            devices = devices.transpose(_integers(match[3])) if match[3] else devices
        return _named_groups(devices.reshape(-1), sizes, match[4])
    return [list(range(num_devices))]


def _named_groups(devices: np.ndarray, sizes: dict[str, int], names: str) -> list[list[int]]:
    """Groups along named axes of a mesh of `sizes`.

    `names` lists the axes of one group. `'a':(2)4` is a part of axis a: the factor 4 after a factor 2.
    """
    # Split each axis that takes part only in part into its factors, then move the group's dimensions last.
    dims, group_dims = [], []
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", names)}
    for name, size in sizes.items():
        before, part = parts.get(name, (None, None))
        if before and part:
            group_dims.append(len(dims) + 1)
            dims += [int(before), int(part), size // int(before) // int(part)]
        else:
            group_dims += [len(dims)] if name in parts else []
            dims.append(size)
    other_dims = [i for i in range(len(dims)) if i not in group_dims]
    group_size = math.prod(dims[i] for i in group_dims)
    return devices.reshape(dims).transpose(other_dims + group_dims).reshape(-1, group_size).tolist()


def _axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    shape = tuple(mesh.shape.values())
    # One array [axes, devices] of mesh coordinates for each group.
    coordinates = [np.array(np.unravel_index(group, shape)) for group in groups]
    differs = np.any([c.min(axis=1) != c.max(axis=1) for c in coordinates], axis=0)
    return tuple(name for name, is_used in zip(mesh.axis_names, differs, strict=True) if is_used)
