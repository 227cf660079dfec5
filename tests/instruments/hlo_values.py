"""The values that a compiled program writes to memory."""

from sphinx_jax.memory_plan.hlo import executed_instructions, parse

# Instructions whose result is memory that exists already.
_ALIASES = (
    "parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "optimization-barrier",
    "all-reduce-done", "all-gather-done", "collective-permute-done", "async-done", "async-update", "copy-done",
)  # fmt: skip


def largest_values(text: str, min_bytes: int) -> list[tuple[int, str]]:
    """(bytes, instruction) of each value of at least `min_bytes` that the program writes to memory, largest first.

    Aliases of existing memory (parameters, tuples, loops) are left out. A copy of weights is found whatever
    instruction makes it.
    """
    found = [
        (size, f"{instruction.opcode} {instruction.name}")
        for instruction, _ in executed_instructions(*parse(text))
        if instruction.opcode not in _ALIASES and (size := instruction.bytes) >= min_bytes
    ]
    return sorted(set(found), reverse=True)
