"""Arithmetic of a prompt of 2,048 words: products of the compiled program times the rounds that a routing yields."""

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
from sphinx_jax.kernels.moe import GPU_BLOCK, IN_PLACE_BLOCKS
from sphinx_jax.kernels.moe_sorted_blocks import block_sizes, moe_sorted_blocks
from sphinx_jax.language.moe import MoE
from sphinx_jax.memory_plan.aot import compile_ahead
from sphinx_jax.memory_plan.hlo import Instruction, called, executed, largest_values, parse
from sphinx_jax.model import bind
from tests.instruments import traffic

FULL, MAX_NUM_SEQS, LENGTH = DecoderConfig(), 4, 512
TOKENS, K, E = MAX_NUM_SEQS * LENGTH, FULL.experts_per_token, FULL.num_experts


LAYOUTS = [{}, {"tensor": 8}, {"tensor": 4, "expert": 2}]


@pytest.fixture(scope="module")
def compiled(gpu_mesh):
    """(layout) -> one full-size mixture of experts on 2,048 words, or its gradient, compiled for A100s as
    `sphinx_jax.memory_plan` compiles; the text of the program."""

    @functools.cache
    def text(axes, gradient):
        mesh = gpu_mesh(**dict(axes))
        graph, params = sharding.abstract_params(lambda rngs: MoE(FULL, rngs=rngs), mesh, dtype=jnp.bfloat16)
        placed = sharding.named_sharding((None,) * 3, (MAX_NUM_SEQS, LENGTH, FULL.dim), mesh)
        x = jax.ShapeDtypeStruct((MAX_NUM_SEQS, LENGTH, FULL.dim), jnp.bfloat16, sharding=placed)
        function = lambda params, x: bind(graph, params)(x)[0]
        if gradient:
            function = jax.grad(lambda params, x: jnp.sum(bind(graph, params)(x)[0].astype(jnp.float32)))
        program = sharding.Program(function, slices_in_place=True)
        return compile_ahead(program, (params, x), mesh).as_text()

    return lambda layout, gradient=False: text(tuple(layout.items()), gradient)


@pytest.fixture(scope="module")
def reads_in_place(gpu_mesh):
    """Whether the installed compiler's products read matrices in their stack."""
    return xla_flags.reads_slices_in_place(gpu_mesh().devices.flat[0])


@pytest.fixture(scope="module")
def sizes(reads_in_place):
    return IN_PLACE_BLOCKS if reads_in_place else block_sizes(K * TOKENS, E, GPU_BLOCK)


def products_by_rows(text: str) -> dict[int, int]:
    """Operations of one round of an innermost loop with products in it, by the rows that it takes.

    There is a loop for all experts or one for each, and the same products in each of these.
    """
    computations, _ = parse(text)
    bodies = {name for body in computations.values() for i in body if i.opcode == "while" for name in called(i)}
    found = collections.defaultdict(set)
    for name in bodies:
        flops = collections.Counter()
        for inside in (name, *(name for i in computations[name] if i.opcode == "fusion" for name in called(i))):
            values = {i.name: i for i in computations[inside]}
            for product in (i for i in values.values() if '"gemm_backend_config"' in i.attributes):
                rows, count = operations(product, values)
                flops[rows] += count
        for rows, count in flops.items():
            found[rows].add(count)
    assert all(len(counts) == 1 for counts in found.values())
    return {rows: counts.pop() for rows, counts in found.items()}


def operations(product: Instruction, values: dict[str, Instruction]) -> tuple[int, int]:
    """The rows of a product, and its operations."""
    shape = lambda kind: [int(n) for n in re.search(r"\[([\d,]+)\]", kind)[1].split(",")]
    config = json.loads(re.search(r"backend_config=(\{.*\})", product.attributes)[1])["gemm_backend_config"]
    summed = config["dot_dimension_numbers"]["lhs_contracting_dimensions"]
    left = shape(values[product.operand_names[0]].type)
    rows, columns = shape(product.type)
    assert FULL.dim <= columns
    return rows, 2 * rows * columns * math.prod(left[int(dim)] for dim in summed)


def routed(kind: str) -> np.ndarray:
    """Two different experts for each word."""
    random = np.random.default_rng(0)
    if kind == "in turn":
        first = np.arange(TOKENS) % E
        return np.stack([first, (first + 1) % E], axis=1)
    share = np.ones(E) if kind == "by chance" else 2.0 ** -np.arange(E)
    return (np.log(share) + random.gumbel(size=(TOKENS, E))).argsort(axis=1)[:, -K:]


@pytest.mark.parametrize("kind", ["in turn", "by chance", "skewed"])
def test_hardly_more_than_two_experts_a_word(compiled, sizes, kind):
    """At most 1.15 times two experts' products for each word, however the words spread over them."""
    count = np.bincount(routed(kind).ravel(), minlength=E)
    assert count.sum() == K * TOKENS and (kind != "skewed" or count.max() > 8 * count.min())
    by_rows = products_by_rows(compiled({}))
    large, small = sorted(by_rows, reverse=True)
    assert (large, small) == sizes
    flops = (count // large).sum() * by_rows[large] + -(-(count % large) // small).sum() * by_rows[small]
    ideal = K * TOKENS * 2 * 3 * FULL.dim * FULL.hidden_dim
    assert ideal <= flops <= 1.15 * ideal


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["by chance", "skewed"])
def test_the_loops_go_round_as_often_as_counted_above(monkeypatch, kind, in_place):
    """The same routing through the loops themselves, run by Python: how many rows each block had."""
    experts, rows = routed(kind), []
    silu = jax.nn.silu
    monkeypatch.setattr(jax.nn, "silu", lambda gate: rows.append(gate.shape[0]) or silu(gate))
    draw = lambda *shape: jnp.ones(shape)
    args = draw(TOKENS, 2), jnp.asarray(experts), draw(TOKENS, K), draw(E, 2, 2, 2), draw(E, 2, 2)
    sizes = IN_PLACE_BLOCKS if in_place else block_sizes(experts.size, E, GPU_BLOCK)
    with jax.disable_jit():
        moe_sorted_blocks(*args, sizes, (), in_place)
    count = np.bincount(experts.ravel(), minlength=E)
    large, small = sizes
    assert rows.count(large) == (count // large).sum()
    assert rows.count(small) == (-(-(count % large) // small)).sum()
    assert len(rows) == rows.count(large) + rows.count(small)


def test_no_array_of_words_by_experts_by_hidden(compiled):
    """In bfloat16 it would be 448 MiB. The largest there may be are one expert's matrices, taken out of the stack."""
    into = FULL.dim * 2 * FULL.hidden_dim * 2
    assert max(size for size, _ in largest_values(compiled({}), 2**20)) <= into < TOKENS * E * FULL.hidden_dim * 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_expert_is_copied_out_of_its_stack(compiled, reads_in_place, layout):
    """Where the compiler can do without: no kernel writes as many numbers as a matrix has, and a block reads each of
    its expert's matrices once. Elsewhere both are copied, once for all of an expert's blocks."""
    text, matrices = compiled(layout), sizes_of_matrices(layout)
    assert copies(text, matrices) == (0 if reads_in_place else 2)
    if reads_in_place:
        loops = 2 * E // layout.get("expert", 1)
        read = sorted(traffic(text).arguments.values())[-2:]
        # A loop counts once: of each expert, the one for its large blocks and the one for its small ones.
        assert read == sorted(2 * size * loops for size in matrices)


def test_no_expert_is_copied_before_the_backward_pass(compiled, reads_in_place):
    """Which copies both matrices, or with jax 0.12 one of them."""
    layout = {"tensor": 8}
    found = copies(compiled(layout, gradient=True), sizes_of_matrices(layout))
    assert found <= 2 if reads_in_place else found == 4


def sizes_of_matrices(layout: dict[str, int]) -> list[int]:
    """Numbers in each of an expert's two matrices on one device."""
    hidden = FULL.hidden_dim // layout.get("tensor", 1)
    return [FULL.dim * 2 * hidden, hidden * FULL.dim]


def copies(text: str, sizes: list[int]) -> int:
    """Kernels that write as many numbers as one of the matrices has."""
    kernels = (i for i, _ in executed(*parse(text)) if i.opcode in ("fusion", "custom-call", "copy"))
    shapes = (shape for i in kernels for shape in re.findall(r"bf16\[([\d,]+)\]", i.type))
    return sum(math.prod(map(int, shape.split(","))) in sizes for shape in shapes)
