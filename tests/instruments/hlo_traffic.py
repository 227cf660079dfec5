"""Memory traffic of a compiled program: the bytes that its kernels read and write, by argument."""

import dataclasses
import math
import re

from sphinx_jax.memory_plan.hlo import Computations, Instruction, called_computations, parse, trip_count, type_bytes

Origin = int | tuple["Origin", ...] | None
"""The argument of the program that a value is, unchanged; a tuple of origins for a tuple; None if it was computed."""

_NAMES = ("parameter", "tuple", "get-tuple-element", "constant", "bitcast", "after-all", "optimization-barrier", "iota")
"""Instructions without memory traffic."""

_ALIASES = ("bitcast", "optimization-barrier", "reshape")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""In-place updates of operand 0, and the index of the operand that they write."""

_ELEMENTWISE = ("convert", "copy", "transpose", "negate")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes on one device in one run of a program; a loop with an unknown trip count counts once."""

    arguments: dict[int, int]
    """Bytes read of each argument, by its index."""
    total: int
    """Bytes read and written by all kernels, cache hits included."""


def traffic(text: str) -> Traffic:
    """The memory traffic of a program in HLO text form.

    A kernel that slices an operand reads the slice; one that updates a part of an operand in place writes the part;
    a kernel of `sphinx_jax.kernels.grouped_matmul` reads at most one matrix per tile; any other kernel reads all of
    its operands and writes its result, once. All branches of a conditional count.
    """
    computations, entry = parse(text)
    count = sum(instruction.opcode == "parameter" for instruction in computations[entry])
    counter = _Counter(computations)
    counter.add_computation(entry, tuple(range(count)), 1)
    return Traffic(counter.arguments, counter.total)


class _Counter:
    def __init__(self, computations: Computations):
        self._computations = computations
        self.arguments: dict[int, int] = {}
        self.total = 0

    def add_computation(self, name: str, parameters: tuple[Origin, ...], times: int) -> None:
        """Add the traffic of `times` runs of a computation; `parameters` are the origins of its parameters."""
        body = {instruction.name: instruction for instruction in self._computations[name]}
        origins: dict[str, Origin] = {}
        for instruction in body.values():
            operands = [origins.get(operand) for operand in instruction.operand_names]
            origins[instruction.name] = self._add_instruction(instruction, body, operands, parameters, times)

    def _add_instruction(
        self,
        instruction: Instruction,
        body: dict[str, Instruction],
        operands: list[Origin],
        parameters: tuple[Origin, ...],
        times: int,
    ) -> Origin:
        """Add the traffic of one instruction; returns the origin of its result."""
        match instruction.opcode:
            case "parameter":
                return parameters[int(instruction.operands)]
            case "tuple":
                return tuple(operands)
            case "get-tuple-element":
                elements = operands[0]
                return elements[_index(instruction)] if isinstance(elements, tuple) else None
            case "while":
                carried = self._unchanged(instruction, operands[0])
                for name in called_computations(instruction):
                    self.add_computation(name, (carried,), times * trip_count(instruction))
                return carried
            case "conditional":
                for name, origin in zip(called_computations(instruction), operands[1:], strict=True):
                    self.add_computation(name, (origin,), times)
                return None
            case "call":
                for name in called_computations(instruction):
                    self.add_computation(name, tuple(operands), times)
                return None
            case opcode if opcode in _NAMES or opcode.endswith(("-done", "-update")):
                return operands[0] if opcode in _ALIASES else None
        inner = self._computations[called_computations(instruction)[0]] if instruction.opcode == "fusion" else None
        self.total += times * _written(instruction, body, inner)
        for index, origin in enumerate(operands):
            size = times * _read(instruction, index, body, inner)
            self.total += size
            if isinstance(origin, int):
                self.arguments[origin] = self.arguments.get(origin, 0) + size
        return None

    def _unchanged(self, loop: Instruction, carried: Origin) -> Origin:
        """The origins of a loop's carry; None for elements that its body changes."""
        body = _search(r"body=%?([\w.\-]+)", loop.attributes)
        instructions = {instruction.name: instruction for instruction in self._computations[body]}
        root = next(instruction for instruction in instructions.values() if instruction.root)
        if not isinstance(carried, tuple) or root.opcode != "tuple":
            return None

        def is_unchanged(name: str, position: int) -> bool:
            source = instructions[name]
            while source.opcode in _ALIASES:
                source = instructions[source.operand_names[0]]
            return source.opcode == "get-tuple-element" and _index(source) == position

        return tuple(
            origin if is_unchanged(name, position) else None
            for position, (origin, name) in enumerate(zip(carried, root.operand_names, strict=True))
        )


def _search(pattern: str, text: str) -> str:
    """The first group of the first match. Raises ValueError without a match."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern} not found in {text}")
    return match[1]


def _index(instruction: Instruction) -> int:
    return int(_search(r"index=(\d+)", instruction.attributes))


def _elements(hlo_type: str) -> int:
    """Elements of the first array of a type."""
    dims = _search(r"\[([\d,]*)\]", hlo_type)
    return math.prod(map(int, filter(None, dims.split(","))))


def _array_bytes(hlo_type: str) -> int:
    """Bytes of the first array of a type."""
    return type_bytes(_search(r"(\w+\[[\d,]*\])", hlo_type))


def _read(instruction: Instruction, index: int, body: dict[str, Instruction], inner: list[Instruction] | None) -> int:
    """Bytes that a kernel reads of the operand of that index."""
    operand = body[instruction.operand_names[index]]
    whole = _elements(operand.type) if "[" in operand.type else 0
    if not whole:
        return 0
    if "grouped_matmul_kernel" in instruction.attributes and operand.type.count(",", 0, operand.type.index("]")) == 2:
        # [groups, in, out]; the last operand but one has one number per tile.
        groups, tiles = _elements(operand.type[: operand.type.index(",")] + "]"), body[instruction.operand_names[-2]]
        used = min(whole, whole // groups * _elements(tiles.type))
    elif inner is None:
        used = _used(instruction, (index,), whole)
    else:
        parameter = next(i for i in inner if i.opcode == "parameter" and i.operands == str(index))
        used = _used_inside(inner, parameter.name, whole, in_place=True)
    return min(used, whole) * type_bytes(operand.type) // whole


def _used(user: Instruction, positions: tuple[int, ...], whole: int) -> int:
    """Elements that an instruction reads of a value of `whole` elements, which is its operand at `positions`."""
    if positions == (0,) and user.opcode in ("dynamic-slice", "slice", "gather"):
        return _elements(user.type)
    return 0 if positions == (0,) and user.opcode in _UPDATES else whole


def _used_inside(inner: list[Instruction], name: str, whole: int, in_place: bool) -> int:
    """Elements that a fused kernel reads of one of its values; elementwise users are followed to their own users."""
    used = whole if any(instruction.root and instruction.name == name for instruction in inner) else 0
    for user in inner:
        positions = tuple(i for i, operand in enumerate(user.operand_names) if operand == name)
        if not positions:
            continue
        if not user.root and user.opcode in _ALIASES + _ELEMENTWISE:
            used += _used_inside(inner, user.name, whole, in_place and user.opcode in _ALIASES)
        elif user.opcode in _UPDATES and not in_place:
            used += whole
        else:
            used += _used(user, positions, whole)
    return used


def _written(instruction: Instruction, body: dict[str, Instruction], inner: list[Instruction] | None) -> int:
    """Bytes that a kernel writes to memory."""
    if inner is None:
        if "__cublas" in instruction.attributes and instruction.type.startswith("("):
            # The other element of the tuple is a workspace.
            return _array_bytes(instruction.type)
        return _result_bytes(instruction, body)
    values = {i.name: i for i in inner}
    root = next(i for i in inner if i.root)
    results = [values[name] for name in root.operand_names] if root.opcode == "tuple" else [root]
    return sum(_result_bytes(result, values) for result in results)


def _result_bytes(result: Instruction, values: dict[str, Instruction]) -> int:
    while result.opcode == "bitcast":
        result = values[result.operand_names[0]]
    index = _UPDATES.get(result.opcode)
    return values[result.operand_names[index]].bytes if index else result.bytes
