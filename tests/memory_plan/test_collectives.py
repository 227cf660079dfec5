"""What devices exchange in a training step, read off the program compiled for GPUs that are not there."""

import jax

import sharding
from sharding import MeshShape, Program
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import compile_ahead, planning_mesh
from sphinx_jax.memory_plan.hlo import collectives
from sphinx_jax.memory_plan.training import training_batch
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig

LAYERS, BATCH, LENGTH, DIM = 2, 8, 256, 512
CONFIG = SphinxConfig(DecoderConfig(DIM, 1024, LAYERS, num_heads=8, num_kv_heads=8, vocab_size=1024), None)


def compiled(shape, **said):
    """{(kind, axes): collective} of a step in bfloat16, and the program before it was compiled."""
    mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape(**shape))
    train_config = TrainConfig(steps=10, batch_size=BATCH, dtype="bfloat16", **said)
    program = train_program(CONFIG, train_config, mesh)
    place = lambda dims: sharding.named_sharding(("batch", None), dims, mesh)
    shapes = training_batch(CONFIG, train_config, LENGTH)
    batch = {name: jax.ShapeDtypeStruct(dims, dtype, sharding=place(dims)) for name, (dims, dtype) in shapes.items()}
    step = Program(program.step, (0,), rules=program.rules, slices_in_place=True)
    found = collectives(compile_ahead(step, (program.state, batch), mesh).as_text(), mesh)
    return {(c.kind, c.axes): c for c in found}, program


def test_gradients_are_scattered_not_copied(needs_gpu_compiler):
    """Each device gets its part of every gradient that is split; what is copied are those of norms and routers."""
    found, program = compiled({"fsdp": 8})
    params = jax.tree.leaves(program.params)
    whole = sum(p.size for p in params if p.sharding.is_fully_replicated)
    split = sum(p.size for p in params) - whole
    assert found["reduce-scatter", ("fsdp",)].bytes == 2 * split
    copied = found["all-reduce", ("fsdp",)]
    # In bfloat16 or float32, and a few numbers of the whole batch.
    assert 2 * whole < copied.bytes < 4 * whole + 1024 < split / 100
    assert set(found) == {(kind, ("fsdp",)) for kind in ("reduce-scatter", "all-reduce", "all-gather")}


def test_a_sharded_residual_is_scattered_and_gathered(needs_gpu_compiler):
    """Recomputing every layer: of a layer's two sums, five are scattered and their counterparts gathered.

    Forwards the sums of attention and experts; again the first, which the second half of the layer starts from;
    backwards the gradients of what was gathered. Gathered are the inputs of both halves, twice forwards, and backwards
    the gradients of what was scattered. The head adds one of each.
    """
    model = ("expert", "tensor")
    found, _ = compiled({"expert": 2, "tensor": 4}, sequence_parallel=True, remat="block")
    words = BATCH * LENGTH * DIM * 2
    scattered, gathered = found["reduce-scatter", model], found["all-gather", model]
    assert (scattered.count, scattered.bytes) == (5 * LAYERS + 1, (5 * LAYERS + 1) * words)
    assert (6 * LAYERS + 1) * words < gathered.bytes < 1.03 * (6 * LAYERS + 1) * words
    # The router's scores and weights, gradients of norms and routers, and in place of a gathered embedding its channels
    # exchanged for words.
    others = [c for c in found.values() if c not in (scattered, gathered)]
    assert {c.kind for c in others} == {"all-reduce", "all-to-all"}
    assert sum(c.bytes for c in others if c.kind == "all-reduce") < 0.02 * scattered.bytes
    assert sum(c.bytes for c in others if c.kind == "all-to-all") < words
