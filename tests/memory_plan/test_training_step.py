"""A training step compiled for absent GPUs: optimizer traffic, no product twice, large copies, and overlap."""

import functools
import re

import jax
import pytest

import sharding
from sharding import MeshShape
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import compile_aot, hlo_text, planning_mesh
from sphinx_jax.memory_plan.hlo import called_computations, executed_instructions, parse
from sphinx_jax.memory_plan.training import training_batch
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig

pytestmark = pytest.mark.optimized

LAYERS = 2
FULL_WIDTH = SphinxConfig(DecoderConfig(num_layers=LAYERS), None)
SMALL = SphinxConfig(DecoderConfig(512, 1024, LAYERS, num_heads=8, num_kv_heads=8, vocab_size=1024), None)

LAYER_COPY, EXPERT_COPY = [(896, LAYERS), (1792, LAYERS)], [(112, LAYERS), (224, LAYERS)]
"""MiB and number of copies of the experts' matrices in all layers: of all experts; and of one, in a loop over experts,
which counts once."""
SLICES_ARE_COPIED = jax.__version_info__ < (0, 11, 2)


def compiled(config, gpu, shape, length, **options):
    """The HLO text of a step in bfloat16, and the number of parameters."""
    mesh, _ = planning_mesh(find_gpu(gpu), MeshShape(**shape))
    train_config = TrainConfig(steps=10, dtype="bfloat16", **options)
    program = train_program(config, train_config, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding.named_sharding(("batch", None), dims, mesh))
        for name, (dims, dtype) in training_batch(config, train_config, length).items()
    }
    text = hlo_text(compile_aot(program.step, (program.state, batch, {}), mesh))
    return text, sum(leaf.size for leaf in jax.tree.leaves(program.params))


@pytest.fixture(scope="module")
def step(needs_gpu_compiler):
    """moments -> two full-width layers of Mixtral on one H200, 2 x 2,048 tokens."""
    return functools.cache(lambda moments: compiled(FULL_WIDTH, "h200", {}, 2048, batch_size=2, moments=moments))


@pytest.mark.parametrize(("moments", "expected"), [("float32", 26), ("bfloat16", 18)])
def test_optimizer_bytes_per_parameter(step, moments, expected):
    """One kernel updates a parameter: it reads the gradient in bfloat16, and reads and writes weight and moments."""
    text, parameters = step(moments)
    computations, entry = parse(text)
    body = {instruction.name: instruction for instruction in computations[entry]}
    moved = 0
    for fusion in computations[entry]:
        operands = [body[name] for name in fusion.operand_names]
        if fusion.opcode == "fusion" and any("__mu__" in operand.name for operand in operands):
            moved += fusion.bytes + sum(operand.bytes for operand in operands)
    assert moved / parameters == pytest.approx(expected, rel=1e-3)


def kernels(text):
    """Each kernel, and how often it runs.

    From jax 0.11.2 on, a call that reads a slice of an array, or writes a part of one, is inside a fusion which passes
    it the addresses.
    """
    computations, entry = parse(text)
    for instruction, times in executed_instructions(computations, entry):
        inner = [computations[name] for name in called_computations(instruction) if instruction.opcode == "fusion"]
        calls = [i for body in inner for i in body if i.opcode == "custom-call"]
        yield from ((kernel, times) for kernel in calls or [instruction])


def test_no_product_is_computed_twice(step):
    """Each matrix has one product forward, one for the gradient of its input, and one for its own."""
    text, _ = step("float32")
    counts = dict.fromkeys(("cublas", "grouped_matmul", "grouped_outer", "flash"), 0)
    for instruction, times in kernels(text):
        for name in counts:
            if instruction.opcode == "custom-call" and re.search(
                rf"__{name}|/_?{name}\w*_kernel", instruction.attributes
            ):
                counts[name] += times
    # Queries with keys and values, attention's output and the router in each layer; and the head.
    matrices, expert_matrices = 3 * LAYERS + 1, 2 * LAYERS
    assert counts == {
        "cublas": 3 * matrices,
        "grouped_matmul": 2 * expert_matrices,
        "grouped_outer": expert_matrices,
        "flash": 3 * LAYERS,
    }


def large_copies(text):
    """(MiB, times) of kernels of 64 MiB and more that copy, transpose or slice an array, by their names; or that write
    the matrices of a layer's experts, other than its gradients.
    """
    copy = r"copy|transpose|.*(copy|transpose|dynamic_slice)_fusion"
    layer, gradient = r"bf16\[(1,)?8,(4096,2,14336|4096,28672|14336,4096)\]", "grouped_outer|broadcast|update_slice"
    found = []
    for kernel, times in kernels(text):
        writes_layer = kernel.opcode in ("fusion", "dynamic-slice", "custom-call") and re.match(layer, kernel.type)
        is_gradient = re.search(gradient, kernel.name + kernel.attributes)
        is_copy = kernel.opcode == "dynamic-slice" or re.match(copy, kernel.name)
        if kernel.bytes >= 64 << 20 and (is_copy or (writes_layer and not is_gradient)):
            found.append((kernel.bytes >> 20, times))
    return sorted(found)


def test_large_copies(step):
    """None of 64 MiB or more.

    Before jax 0.11.2 the matrices of a layer's experts are sliced from their stack in the forward and in the backward
    pass. Kernels that add the layer's offset to an expert's number could read the stack instead. They do not: newer
    compilers give ours the address of the slice.
    """
    assert large_copies(step("float32")[0]) == (sorted(2 * LAYER_COPY) if SLICES_ARE_COPIED else [])


def test_large_copies_for_products_in_blocks(needs_gpu_compiler):
    """A layer's matrices in the forward and in the backward pass; of each expert in the backward pass, and before jax
    0.11.2 in the forward pass too; and gate and up of a layer, which the forward pass stored.
    """
    text, _ = compiled(FULL_WIDTH, "a100-80gb", {}, 2048, batch_size=2)
    of_expert = EXPERT_COPY * (2 if SLICES_ARE_COPIED else 1)
    assert large_copies(text) == sorted([*2 * LAYER_COPY, *of_expert, (462, LAYERS)])


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_collectives_overlap_with_work(needs_gpu_compiler, shape):
    """Between the start and the end of nearly every collective a kernel runs; by default none does under fsdp."""
    text, _ = compiled(SMALL, "a100-80gb", shape, 256, batch_size=8, remat="block")
    assert "is_scheduled=true" in text
    pairs, with_work = 0, 0
    for instructions in parse(text)[0].values():
        index = {instruction.name: i for i, instruction in enumerate(instructions)}
        for i, instruction in enumerate(instructions):
            if not re.fullmatch(r"(all-\w+|reduce-scatter)-done", instruction.opcode):
                continue
            between = instructions[index[instruction.operand_names[0]] + 1 : i]
            pairs += 1
            with_work += any(other.opcode in ("fusion", "custom-call", "while") for other in between)
    assert pairs > 10
    assert with_work >= 0.9 * pairs
