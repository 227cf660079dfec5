"""The HLO parser on handwritten text with known results, and on a small compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sharding
from sphinx_jax.memory_plan.aot import hlo_text
from sphinx_jax.memory_plan.hlo import Collective, collectives, executed_instructions, parse, type_bytes
from tests.instruments import largest_values

pytestmark = pytest.mark.optimized

TEXT = """HloModule example, is_scheduled=true

%fused (p.0: bf16[8,4]) -> bf16[8,4] {
  %p.0 = bf16[8,4]{1,0} parameter(0)
  ROOT %copy.9 = bf16[8,4]{0,1} copy(%p.0)
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%body (c: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %c = (s32[], bf16[16,64]{1,0}) parameter(0)
  %x = bf16[16,64]{1,0} get-tuple-element(%c), index=1
  %ar = bf16[16,64]{1,0} all-reduce-start(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  %ard = bf16[16,64]{1,0} all-reduce-done(%ar)
  %i = s32[] constant(1)
  ROOT %out = (s32[], bf16[16,64]{1,0}) tuple(%i, %ard)
}

%condition (c: (s32[], bf16[16,64])) -> pred[] {
  %c.1 = (s32[], bf16[16,64]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (w: bf16[8,4], x: (s32[], bf16[16,64])) -> bf16[8,4] {
  %w = bf16[8,4]{1,0} parameter(0)
  %x.1 = (s32[], bf16[16,64]{1,0}) parameter(1)
  %loop = (s32[], bf16[16,64]{1,0}) while(%x.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"32"}}
  %ag = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %rs = ((bf16[8,4]{1,0}, f32[16]{0}), (bf16[1,4]{1,0}, f32[2]{0})) reduce-scatter-start(%w, %v), replica_groups=[1,8]<=[8]
  %one = f32[2]{0} reduce-scatter(%v), replica_groups=[1,8]<=[8], dimensions={0}
  %agd = bf16[64,4]{1,0} all-gather-done(%ag)
  ROOT %f = bf16[8,4]{0,1} fusion(%w), kind=kLoop, calls=%fused
}
"""  # noqa: E501

# The flattened mesh of fsdp 2 x expert 2 x tensor 2 numbers tensor fastest.
GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": ("tensor",),
    "{{0,2},{1,3},{4,6},{5,7}}": ("expert",),
    "[4,2]<=[8]": ("tensor",),
    "[4,2]<=[2,4]T(1,0)": ("fsdp",),
    "[2,4]<=[8]": ("expert", "tensor"),
    "mesh['a'=2,'b'=4] {'a'}": ("fsdp",),
    "mesh['a'=8] {'a':(2)2}": ("expert",),
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": ("fsdp",),
    "{{0,1,2,3,4,5,6,7}}": ("fsdp", "expert", "tensor"),
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(fsdp=2, expert=2, tensor=2)


@pytest.mark.parametrize(("groups", "axes"), GROUPS.items())
def test_collectives_by_axis_and_trip_count(mesh, groups, axes):
    found = collectives(TEXT.replace("GROUPS", groups), mesh)
    reduced = Collective("all-reduce", axes, 32, 32 * 16 * 64 * 2)
    gathered = Collective("all-gather", ("fsdp", "expert", "tensor"), 1, 64 * 4 * 2)
    scattered = Collective("reduce-scatter", gathered.axes, 2, 8 * 4 * 2 + 2 * 16 * 4)
    assert found == [reduced, gathered, scattered]


def test_all_reduce_whose_type_is_a_pair(mesh):
    """jax 0.11.2 and 0.12 give an all-reduce-start the type (input, output): the bytes are the same."""
    types = "bf16[16,64]{1,0} all-reduce-start", "((bf16[16,64]{1,0}), bf16[16,64]{1,0}) all-reduce-start"
    assert types[0] in TEXT

    def parsed(text):
        return collectives(text.replace("GROUPS", "[4,2]<=[8]"), mesh)

    assert parsed(TEXT.replace(*types)) == parsed(TEXT)
    # A combined all-reduce of two arrays, in the older and the newer form.
    two = "(bf16[16,64]{1,0}, f32[3]{0}) all-reduce-start"
    assert parsed(TEXT.replace(types[0], two))[0].bytes == 32 * (16 * 64 * 2 + 3 * 4)
    two = "((bf16[16,64]{1,0}, f32[3]{0}), (bf16[16,64]{1,0}, f32[3]{0})) all-reduce-start"
    assert parsed(TEXT.replace(types[0], two))[0].bytes == 32 * (16 * 64 * 2 + 3 * 4)


def test_values_written_to_memory():
    """Parameters and loops alias memory; values inside a fusion are not written."""
    assert [name for _, name in largest_values(TEXT, 1)] == [
        "all-reduce-start ar",
        "all-gather-start ag",
        "reduce-scatter-start rs",
        "fusion f",
        "reduce-scatter one",
        "constant i",
        "constant yes",
    ]
    assert largest_values(TEXT, 200) == [(2048, "all-reduce-start ar"), (576, "all-gather-start ag")]


def test_sizes_of_types():
    assert type_bytes("(bf16[2,3]{1,0}, (s32[], u4[8]))") == 12 + 4 + 4
    assert type_bytes("pred[]") == 1


def test_a_compiled_program(mesh):
    """A matmul all-reduced over `tensor`, in a loop of trip count five."""
    replicated, row_parallel = (NamedSharding(mesh, PartitionSpec(axis, None)) for axis in (None, "tensor"))
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=replicated)
    w = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=row_parallel)

    def function(x, w):
        def step(x, _):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), replicated), None

        return jax.lax.scan(step, x, None, length=5)[0]

    text = hlo_text(sharding.Program(function).compile((x, w), mesh))
    assert collectives(text, mesh) == [Collective("all-reduce", ("tensor",), 5, 5 * 4 * 8 * 4)]
    computations, entry = parse(text)
    counts = [count for i, count in executed_instructions(computations, entry) if i.opcode == "while"]
    assert counts == [1]
