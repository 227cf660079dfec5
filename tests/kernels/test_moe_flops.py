"""Arithmetic of 2,048 prompt tokens: products in the compiled program times the trip counts of a routing."""

import collections
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from sharding import xla_flags
from sphinx_jax.config import DecoderConfig
from sphinx_jax.kernels.moe import GPU_MAX_BLOCK_SIZE, IN_PLACE_BLOCK_SIZES
from sphinx_jax.kernels.moe_sorted_blocks import block_sizes, moe_sorted_blocks
from sphinx_jax.language.moe import MoE
from sphinx_jax.memory_plan.aot import compile_aot
from sphinx_jax.memory_plan.hlo import Instruction, called_computations, executed_instructions, parse
from sphinx_jax.model import bind
from tests.instruments import largest_values, traffic

pytestmark = pytest.mark.optimized

FULL, MAX_NUM_SEQS, LENGTH = DecoderConfig(), 4, 512
TOKENS, K, E = MAX_NUM_SEQS * LENGTH, FULL.experts_per_token, FULL.num_experts


LAYOUTS = [{}, {"tensor": 8}, {"tensor": 4, "expert": 2}]


@pytest.fixture(scope="module")
def compiled(gpu_mesh):
    """(layout) -> HLO of one full-size mixture-of-experts layer on 2,048 tokens, or of its gradient, for A100s.

    Compiled as `sphinx_jax.memory_plan` compiles."""

    @functools.cache
    def text(axes, gradient):
        mesh = gpu_mesh(**dict(axes))
        graph, params = sharding.abstract_params(lambda rngs: MoE(FULL, rngs=rngs), mesh, dtype=jnp.bfloat16)
        x_sharding = sharding.named_sharding((None,) * 3, (MAX_NUM_SEQS, LENGTH, FULL.dim), mesh)
        x = jax.ShapeDtypeStruct((MAX_NUM_SEQS, LENGTH, FULL.dim), jnp.bfloat16, sharding=x_sharding)

        def forward(params, x):
            return bind(graph, params)(x)[0]

        def loss(params, x):
            return jnp.sum(forward(params, x).astype(jnp.float32))

        program = sharding.Program(jax.grad(loss) if gradient else forward, slices_in_place=True)
        return compile_aot(program, (params, x), mesh).as_text()

    return lambda layout, gradient=False: text(tuple(layout.items()), gradient)


@pytest.fixture(scope="module")
def reads_in_place(gpu_mesh):
    """Whether the installed compiler's products read matrices in their stack, without a copy."""
    return xla_flags.reads_slices_in_place(gpu_mesh().devices.flat[0])


@pytest.fixture(scope="module")
def sizes(reads_in_place):
    return IN_PLACE_BLOCK_SIZES if reads_in_place else block_sizes(K * TOKENS, E, GPU_MAX_BLOCK_SIZE)


def products_by_rows(text: str) -> dict[int, int]:
    """Floating-point operations of one iteration of an innermost loop with products, by the rows of its block.

    There is one loop for all experts or one per expert, with the same products in each.
    """
    computations, _ = parse(text)
    bodies = {
        name for body in computations.values() for i in body if i.opcode == "while" for name in called_computations(i)
    }
    flops_by_rows = collections.defaultdict(set)
    for name in bodies:
        flops = collections.Counter()
        for inside in (
            name,
            *(name for i in computations[name] if i.opcode == "fusion" for name in called_computations(i)),
        ):
            values = {i.name: i for i in computations[inside]}
            for product in (i for i in values.values() if '"gemm_backend_config"' in i.attributes):
                rows, count = operations(product, values)
                flops[rows] += count
        for rows, count in flops.items():
            flops_by_rows[rows].add(count)
    assert all(len(counts) == 1 for counts in flops_by_rows.values())
    return {rows: counts.pop() for rows, counts in flops_by_rows.items()}


def operations(product: Instruction, values: dict[str, Instruction]) -> tuple[int, int]:
    """The rows of a product, and its floating-point operations."""

    def shape(type_):
        return [int(n) for n in re.search(r"\[([\d,]+)\]", type_)[1].split(",")]

    config = json.loads(re.search(r"backend_config=(\{.*\})", product.attributes)[1])["gemm_backend_config"]
    contracted = config["dot_dimension_numbers"]["lhs_contracting_dimensions"]
    left = shape(values[product.operand_names[0]].type)
    rows, columns = shape(product.type)
    assert FULL.dim <= columns
    return rows, 2 * rows * columns * math.prod(left[int(dim)] for dim in contracted)


def route(kind: str) -> np.ndarray:
    """Two different experts for each token."""
    random = np.random.default_rng(0)
    if kind == "round robin":
        first = np.arange(TOKENS) % E
        return np.stack([first, (first + 1) % E], axis=1)
    load = np.ones(E) if kind == "random" else 2.0 ** -np.arange(E)
    return (np.log(load) + random.gumbel(size=(TOKENS, E))).argsort(axis=1)[:, -K:]


@pytest.mark.parametrize("kind", ["round robin", "random", "skewed"])
def test_arithmetic_is_that_of_two_experts_per_token(compiled, sizes, kind):
    """At most 1.15 times two experts' products per token, however uneven the routing is."""
    count = np.bincount(route(kind).ravel(), minlength=E)
    assert count.sum() == K * TOKENS and (kind != "skewed" or count.max() > 8 * count.min())
    by_rows = products_by_rows(compiled({}))
    large, small = sorted(by_rows, reverse=True)
    assert (large, small) == sizes
    flops = (count // large).sum() * by_rows[large] + -(-(count % large) // small).sum() * by_rows[small]
    ideal = K * TOKENS * 2 * 3 * FULL.dim * FULL.hidden_dim
    assert ideal <= flops <= 1.15 * ideal


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["random", "skewed"])
def test_trip_counts_are_those_counted_above(monkeypatch, kind, in_place):
    """The loops executed by Python with the same routing: the rows of each block."""
    experts, rows, silu = route(kind), [], jax.nn.silu

    def record_rows(gate):
        rows.append(gate.shape[0])
        return silu(gate)

    monkeypatch.setattr(jax.nn, "silu", record_rows)
    x, weights, w_in, w_out = map(jnp.ones, ((TOKENS, 2), (TOKENS, K), (E, 2, 2, 2), (E, 2, 2)))
    sizes = IN_PLACE_BLOCK_SIZES if in_place else block_sizes(experts.size, E, GPU_MAX_BLOCK_SIZE)
    with jax.disable_jit():
        moe_sorted_blocks(x, jnp.asarray(experts), weights, w_in, w_out, sizes, (), in_place)
    count = np.bincount(experts.ravel(), minlength=E)
    large, small = sizes
    assert rows.count(large) == (count // large).sum()
    assert rows.count(small) == (-(-(count % large) // small)).sum()
    assert len(rows) == rows.count(large) + rows.count(small)


def test_no_array_of_tokens_by_experts_by_hidden(compiled):
    """In bfloat16 it would be 448 MiB. The largest arrays allowed are copies of one expert's matrices."""
    w_in_bytes = FULL.dim * 2 * FULL.hidden_dim * 2
    assert max(size for size, _ in largest_values(compiled({}), 2**20)) <= w_in_bytes < TOKENS * E * FULL.hidden_dim * 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_expert_is_copied_out_of_its_stack(compiled, reads_in_place, layout):
    """With a compiler that reads matrices in place no kernel writes an array of a matrix's size, and a block reads each
    of its expert's matrices once. With others both are copied, once for all blocks of an expert."""
    text, matrices = compiled(layout), matrix_sizes(layout)
    assert copies(text, matrices) == (0 if reads_in_place else 2)
    if reads_in_place:
        loops = 2 * E // layout.get("expert", 1)
        read = sorted(traffic(text).arguments.values())[-2:]
        # A loop counts once; each expert has one for its large blocks and one for its small ones.
        assert read == sorted(2 * size * loops for size in matrices)


def test_no_expert_is_copied_before_the_backward_pass(compiled, reads_in_place):
    """The backward pass copies both matrices, or one of them with jax 0.12."""
    layout = {"tensor": 8}
    num_copies = copies(compiled(layout, gradient=True), matrix_sizes(layout))
    assert num_copies <= 2 if reads_in_place else num_copies == 4


def matrix_sizes(layout: dict[str, int]) -> list[int]:
    """Elements of each of an expert's two matrices on one device."""
    hidden = FULL.hidden_dim // layout.get("tensor", 1)
    return [FULL.dim * 2 * hidden, hidden * FULL.dim]


def copies(text: str, sizes: list[int]) -> int:
    """Kernels that write an array of the size of one of the matrices."""
    kernels = (i for i, _ in executed_instructions(*parse(text)) if i.opcode in ("fusion", "custom-call", "copy"))
    shapes = (shape for i in kernels for shape in re.findall(r"bf16\[([\d,]+)\]", i.type))
    return sum(math.prod(map(int, shape.split(","))) in sizes for shape in shapes)
