"""Workspaces of cuDNN's attention, which programs compiled without the library leave out.

XLA asks cuDNN for the bytes that a call needs, and gives the call a result of as many, which the buffer assignment
counts. Compiled for an absent GPU, that result has no bytes.
"""

import math

from sphinx_jax.memory_plan.hlo import Instruction, array_shapes, executed_instructions, parse


def cudnn_workspace_bytes(text: str) -> int:
    """The most that a call of the program `text` needs beyond what is counted; calls run one at a time."""
    return max((_missing_bytes(instruction) for instruction, _ in executed_instructions(*parse(text))), default=0)


def _missing_bytes(instruction: Instruction) -> int:
    """Of one call, 0 if its workspace is counted. The forward pass needs none.

    The backward pass sums the gradients of queries in float32, and has a float32 number for each query of each head.
    Where query heads share a key head, it also writes the gradients of keys and values for each query head (the node
    of the backward pass in https://github.com/NVIDIA/cudnn-frontend, scaled_dot_product_flash_attention.h).
    """
    if "__cudnn$fmha" not in instruction.attributes or "Backward" not in instruction.attributes:
        return 0
    # The gradients of queries, keys and values, [batch, heads, length, head_dim], and the workspace.
    queries, keys, _, workspace = array_shapes(instruction.type)
    if workspace != (0,):
        return 0
    numbers = math.prod(queries)
    by_query_head = 0 if queries[1] == keys[1] else 2 * 2 * math.prod((queries[0], queries[1], *keys[2:]))
    return 4 * numbers + 4 * numbers // queries[-1] + by_query_head
