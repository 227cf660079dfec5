"""Collectives of a training step, parsed from the program compiled for absent GPUs."""

import jax
import pytest

import sharding
from sharding import MeshShape
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import compile_aot, hlo_text, planning_mesh
from sphinx_jax.memory_plan.hlo import collectives
from sphinx_jax.memory_plan.training import training_batch
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig

pytestmark = pytest.mark.optimized

LAYERS, BATCH, LENGTH, DIM = 2, 8, 256, 512
CONFIG = SphinxConfig(DecoderConfig(DIM, 1024, LAYERS, num_heads=8, num_kv_heads=8, vocab_size=1024), None)


def compiled(shape, **options):
    """{(kind, axes): collective} of a step in bfloat16, and its TrainProgram."""
    text, program = step_program(CONFIG, MeshShape(**shape), **options)
    return {(c.kind, c.axes): c for c in collectives(text, program.mesh)}, program


def step_program(config, shape, **options):
    """The text of a step in bfloat16, compiled for absent GPUs, and its TrainProgram."""
    mesh, _ = planning_mesh(find_gpu("a100-80gb"), shape)
    train_config = TrainConfig(steps=10, batch_size=BATCH, dtype="bfloat16", **options)
    program = train_program(config, train_config, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding.named_sharding(("batch", None), dims, mesh))
        for name, (dims, dtype) in training_batch(config, train_config, LENGTH).items()
    }
    return hlo_text(compile_aot(program.step, (program.state, batch, {}), mesh)), program


def test_gradients_are_reduce_scattered(needs_gpu_compiler):
    """fsdp reduce-scatters the gradients of all sharded parameters; those of norms and routers are all-reduced."""
    found, program = compiled({"fsdp": 8})
    params = jax.tree.leaves(program.params)
    replicated = sum(p.size for p in params if p.sharding.is_fully_replicated)
    sharded = sum(p.size for p in params) - replicated
    assert found["reduce-scatter", ("fsdp",)].bytes == 2 * sharded
    reduced = found["all-reduce", ("fsdp",)]
    # In bfloat16 or float32, and a few scalars of the global batch.
    assert 2 * replicated < reduced.bytes < 4 * replicated + 1024 < sharded / 100
    assert set(found) == {(kind, ("fsdp",)) for kind in ("reduce-scatter", "all-reduce", "all-gather")}


def test_sequence_parallel_reduce_scatters_and_all_gathers(needs_gpu_compiler):
    """With sequence parallelism and remat of every layer: five reduce-scatters and six all-gathers per layer.

    Reduce-scatters: the outputs of attention and experts in the forward pass; that of attention once more in
    rematerialisation, as the input of the experts; the gradients of the two all-gathered inputs. All-gathers: the
    inputs of attention and experts in the forward pass and in rematerialisation; the gradients of the two
    reduce-scattered outputs. The head adds one of each.
    """
    model = ("expert", "tensor")
    found, _ = compiled({"expert": 2, "tensor": 4}, sequence_parallel=True, remat="block")
    activation_bytes = BATCH * LENGTH * DIM * 2
    scattered, gathered = found["reduce-scatter", model], found["all-gather", model]
    assert (scattered.count, scattered.bytes) == (5 * LAYERS + 1, (5 * LAYERS + 1) * activation_bytes)
    expected = (6 * LAYERS + 1) * activation_bytes
    assert expected < gathered.bytes < 1.03 * expected
    # The router's logits and weights and the gradients of norms and routers; and, in place of an all-gather of the
    # embedding, an all-to-all from channels to tokens.
    others = [c for c in found.values() if c not in (scattered, gathered)]
    assert {c.kind for c in others} == {"all-reduce", "all-to-all"}
    assert sum(c.bytes for c in others if c.kind == "all-reduce") < 0.02 * scattered.bytes
    assert sum(c.bytes for c in others if c.kind == "all-to-all") < activation_bytes
