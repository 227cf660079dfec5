"""A training step of adapters on a quantized base, compiled for absent GPUs: one expert is dequantized at a time."""

import jax
import pytest

from sharding import MeshShape
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import compile_aot, hlo_text, memory_analysis, planning_mesh
from sphinx_jax.memory_plan.hlo import executed_instructions, parse
from sphinx_jax.memory_plan.training import abstract_batch, training_batch
from sphinx_jax.training.program import train_program
from sphinx_jax.training.train_config import TrainConfig

pytestmark = pytest.mark.optimized

CONFIG = SphinxConfig(DecoderConfig(num_layers=2, vocab_size=512), None)
"""Two layers of Mixtral-8x7B, with little around them."""

LANGUAGE = CONFIG.language
EXPERT_IN, EXPERT_OUT = 4 * LANGUAGE.dim * LANGUAGE.hidden_dim, 2 * LANGUAGE.dim * LANGUAGE.hidden_dim
"""Bytes of an expert's matrices in bfloat16."""


@pytest.fixture(scope="module", params=["int8", "int4"])
def step(request, needs_gpu_compiler):
    """Bytes of a layer of the base, the step's HLO, and bytes of its temporaries."""
    mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape())
    train_config = TrainConfig(
        **{"steps": 10, "batch_size": 2, "grad_accum_steps": 2, "stage": "lora", "lora_rank": 16},
        **{"dtype": "bfloat16", "remat": "block", "quantize": request.param},
    )
    program = train_program(CONFIG, train_config, mesh)
    batch = abstract_batch(training_batch(CONFIG, train_config, 512), mesh)
    compiled = compile_aot(program.step, (program.state, batch, program.frozen_params), mesh)
    layers = jax.tree.leaves(program.params["model"]["language"]["layers"])
    integers = sum(leaf.size * leaf.dtype.itemsize for leaf in layers) // LANGUAGE.num_layers
    return integers, hlo_text(compiled), memory_analysis(compiled).temporaries


def test_one_expert_is_dequantized_at_a_time(step):
    """Floating-point arrays as large as an expert's second matrix are the two of one expert. Next to a layer's
    integers, which are sliced from those of all layers, and activations, temporaries have no room for a second one.
    """
    integers, text, temporaries = step
    sizes = {
        instruction.bytes
        for instruction, _ in executed_instructions(*parse(text))
        if instruction.type.startswith(("bf16", "f32", "f16")) and instruction.bytes >= EXPERT_OUT
    }
    assert sizes == {EXPERT_IN, EXPERT_OUT}
    assert temporaries < integers + 2 * (EXPERT_IN + EXPERT_OUT)
