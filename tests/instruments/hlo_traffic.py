"""Reading a compiled program: the bytes that its kernels move, and of which argument they are."""

import dataclasses
import math
import re

from sphinx_jax.memory_plan.hlo import Computations, Instruction, called_computations, parse, trip_count, type_bytes

Origin = int | tuple["Origin", ...] | None
"""Which argument of the program a value is, unchanged; a tuple of origins for a tuple; None if it was made."""

_NAMES = ("parameter", "tuple", "get-tuple-element", "constant", "bitcast", "after-all", "optimization-barrier", "iota")
"""Instructions that give something in memory a name and move nothing."""

_SAME = ("bitcast", "optimization-barrier", "reshape")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that write into their first operand, and which operand is what they write."""

_ONE_BY_ONE = ("convert", "copy", "transpose", "negate")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one device in one run of a program, in which a loop of an unknown number of rounds goes round once."""

    arguments: dict[int, int]
    """Read of each argument, by its number."""
    total: int
    """Read and written by all kernels, what lies in a cache included."""


def traffic(text: str) -> Traffic:
    """What a program in HLO's text form moves.

    A kernel that slices an operand reads the slice; one that updates a part of an operand in place writes the part;
    a kernel of `sphinx_jax.kernels.grouped_matmul` reads at most one matrix for each tile; any other reads its
    operands and writes its result whole, once. All branches of a conditional count.
    """
    computations, entry = parse(text)
    count = sum(instruction.opcode == "parameter" for instruction in computations[entry])
    found = _Walk(computations)
    found.through(entry, tuple(range(count)), 1)
    return Traffic(found.arguments, found.total)


class _Walk:
    def __init__(self, computations: Computations):
        self._computations = computations
        self.arguments: dict[int, int] = {}
        self.total = 0

    def through(self, name: str, given: tuple[Origin, ...], times: int) -> None:
        """Count what computation `name` moves in `times` runs, of which the parameters are `given`."""
        body = {instruction.name: instruction for instruction in self._computations[name]}
        origins: dict[str, Origin] = {}
        for instruction in body.values():
            operands = [origins.get(operand) for operand in instruction.operand_names]
            origins[instruction.name] = self._step(instruction, body, operands, given, times)

    def _step(
        self,
        instruction: Instruction,
        body: dict[str, Instruction],
        operands: list[Origin],
        given: tuple[Origin, ...],
        times: int,
    ) -> Origin:
        """Count one instruction; the origin of its result."""
        match instruction.opcode:
            case "parameter":
                return given[int(instruction.operands)]
            case "tuple":
                return tuple(operands)
            case "get-tuple-element":
                inside = operands[0]
                return inside[_index(instruction)] if isinstance(inside, tuple) else None
            case "while":
                kept = self._unchanged(instruction, operands[0])
                for name in called_computations(instruction):
                    self.through(name, (kept,), times * trip_count(instruction))
                return kept
            case "conditional":
                for name, origin in zip(called_computations(instruction), operands[1:], strict=True):
                    self.through(name, (origin,), times)
                return None
            case "call":
                for name in called_computations(instruction):
                    self.through(name, tuple(operands), times)
                return None
            case opcode if opcode in _NAMES or opcode.endswith(("-done", "-update")):
                return operands[0] if opcode in _SAME else None
        inner = self._computations[called_computations(instruction)[0]] if instruction.opcode == "fusion" else None
        self.total += times * _written(instruction, body, inner)
        for number, origin in enumerate(operands):
            size = times * _read(instruction, number, body, inner)
            self.total += size
            if isinstance(origin, int):
                self.arguments[origin] = self.arguments.get(origin, 0) + size
        return None

    def _unchanged(self, loop: Instruction, carried: Origin) -> Origin:
        """The origin of what a loop carries, None where its body hands on something else than it was given."""
        body = re.search(r"body=%?([\w.\-]+)", loop.attributes)
        instructions = {instruction.name: instruction for instruction in self._computations[body[1]]}
        root = next(instruction for instruction in instructions.values() if instruction.root)
        if not isinstance(carried, tuple) or root.opcode != "tuple":
            return None

        def is_given(name: str, place: int) -> bool:
            source = instructions[name]
            while source.opcode in _SAME:
                source = instructions[source.operand_names[0]]
            return source.opcode == "get-tuple-element" and _index(source) == place

        return tuple(
            origin if is_given(name, place) else None
            for place, (origin, name) in enumerate(zip(carried, root.operand_names, strict=True))
        )


def _index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _elements(kind: str) -> int:
    """Of the first array of a type."""
    dims = re.search(r"\[([\d,]*)\]", kind)[1]
    return math.prod(map(int, filter(None, dims.split(","))))


def _array_bytes(kind: str) -> int:
    """Of the first array of a type."""
    return type_bytes(re.search(r"\w+\[[\d,]*\]", kind)[0])


def _read(instruction: Instruction, number: int, body: dict[str, Instruction], inner: list[Instruction] | None) -> int:
    """Bytes that a kernel reads of its operand of that number."""
    operand = body[instruction.operand_names[number]]
    whole = _elements(operand.type) if "[" in operand.type else 0
    if not whole:
        return 0
    if "grouped_matmul_kernel" in instruction.attributes and operand.type.count(",", 0, operand.type.index("]")) == 2:
        # [groups, in, out]; the last operands but one are of one number for each tile.
        groups, tiles = _elements(operand.type[: operand.type.index(",")] + "]"), body[instruction.operand_names[-2]]
        used = min(whole, whole // groups * _elements(tiles.type))
    elif inner is None:
        used = _used(instruction, (number,), whole)
    else:
        parameter = next(i for i in inner if i.opcode == "parameter" and i.operands == str(number))
        used = _used_inside(inner, parameter.name, whole, in_place=True)
    return min(used, whole) * type_bytes(operand.type) // whole


def _used(user: Instruction, places: tuple[int, ...], whole: int) -> int:
    """Elements that one instruction takes of a value of `whole` elements that is its operand at `places`."""
    if places == (0,) and user.opcode in ("dynamic-slice", "slice", "gather"):
        return _elements(user.type)
    return 0 if places == (0,) and user.opcode in _UPDATES else whole


def _used_inside(inner: list[Instruction], name: str, whole: int, in_place: bool) -> int:
    """Elements that a fused kernel takes of a value in it. What is only named or converted is read where it is used."""
    used = whole if any(instruction.root and instruction.name == name for instruction in inner) else 0
    for user in inner:
        places = tuple(i for i, operand in enumerate(user.operand_names) if operand == name)
        if not places:
            continue
        if not user.root and user.opcode in _SAME + _ONE_BY_ONE:
            used += _used_inside(inner, user.name, whole, in_place and user.opcode in _SAME)
        elif user.opcode in _UPDATES and not in_place:
            used += whole
        else:
            used += _used(user, places, whole)
    return used


def _written(instruction: Instruction, body: dict[str, Instruction], inner: list[Instruction] | None) -> int:
    """Bytes that a kernel writes."""
    if inner is None:
        if "__cublas" in instruction.attributes and instruction.type.startswith("("):
            # The rest of the tuple is a workspace.
            return _array_bytes(instruction.type)
        return _result_bytes(instruction, body)
    values = {i.name: i for i in inner}
    root = next(i for i in inner if i.root)
    results = [values[name] for name in root.operand_names] if root.opcode == "tuple" else [root]
    return sum(_result_bytes(result, values) for result in results)


def _result_bytes(result: Instruction, values: dict[str, Instruction]) -> int:
    while result.opcode == "bitcast":
        result = values[result.operand_names[0]]
    place = _UPDATES.get(result.opcode)
    return values[result.operand_names[place]].bytes if place else result.bytes
