"""Quantized weights in decode steps compiled for absent GPUs: integers are read, and no matrix is written."""

import functools

import jax
import jax.numpy as jnp
import pytest

import sharding
from sharding import MeshShape
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.hardware import find_gpu
from sphinx_jax.inference.offload_params import abstract_offloaded
from sphinx_jax.kernels.quantized import Quantized
from sphinx_jax.memory_plan.abstract_inputs import AbstractInputs
from sphinx_jax.memory_plan.aot import compile_aot, hlo_text, planning_mesh
from sphinx_jax.memory_plan.offload import offload_jobs
from sphinx_jax.model import SphinxMoE
from sphinx_jax.quantization import abstract_quantized_params
from tests.instruments import largest_values, traffic

pytestmark = pytest.mark.optimized

CONFIG = SphinxConfig(DecoderConfig(num_layers=1), None)
"""One layer of Mixtral-8x7B, and its output head."""

DIM, E, K = CONFIG.language.dim, CONFIG.language.num_experts, CONFIG.language.experts_per_token
SMALLEST_MATRIX = DIM * DIM * 2
"""Bytes of attention's output projection in bfloat16."""

SOME = [("a100-80gb", "int8", 64), ("a100-80gb", "int4", 4), ("a100-80gb", "int4", 64)]
"""GPU, quantization and sequences; MORE of them are slow. An L40S has the compute capability of an RTX 4090."""

MORE = [
    *(("a100-80gb", *case) for case in [("int8", 1), ("int8", 4), ("int4", 1), ("int4", 16)]),
    *((gpu, *case) for gpu in ("rtx4090", "h200") for case in [("int8", 64), ("int4", 4)]),
    ("rtx3090", "int4", 64),
]


@pytest.fixture(scope="module")
def decode(needs_gpu_compiler):
    """(GPU, int8 or int4, sequences) -> the HLO of a decode step, and (argument, parameter) of each quantized one."""

    @functools.cache
    def compiled(gpu, kind, num_seqs):
        mesh, _ = planning_mesh(find_gpu(gpu), MeshShape())
        graph, params = sharding.abstract_params(
            lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
        )
        params = abstract_quantized_params(params, kind)
        inputs = AbstractInputs(CONFIG, graph, params, mesh, num_seqs, 64)
        scalar = inputs.replicated(())
        cancelled = inputs.replicated((inputs.state.num_seqs,), jnp.bool_)
        args = params, inputs.state, cancelled, inputs.stops, scalar, scalar, inputs.wants_top
        program = inputs.programs.decode(inputs.state, inputs.state.cache_len, quantized=True)
        numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
        pairs = zip(*(jax.tree.leaves(tree, is_leaf=is_quantized) for tree in (numbers, params)), strict=True)
        return hlo_text(compile_aot(program, args, mesh)), [pair for pair in pairs if is_quantized(pair[1])]

    return compiled


def is_quantized(leaf):
    return isinstance(leaf, Quantized)


def stored_bytes(leaf):
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf))


@pytest.mark.parametrize(
    ("gpu", "kind", "num_seqs"),
    [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_decode_reads_integers(decode, gpu, kind, num_seqs):
    text, quantized = decode(gpu, kind, num_seqs)
    assert len(quantized) == 5
    read = traffic(text).arguments
    # One sequence reads the experts that its token chose, more of them all experts.
    fraction = K / E if num_seqs == 1 else 1
    needed = sum(stored_bytes(leaf) * (fraction if leaf.shape[0] == E else 1) for _, leaf in quantized)
    assert sum(read[i] for numbers, _ in quantized for i in jax.tree.leaves(numbers)) <= 1.1 * needed
    assert not largest_values(text, SMALLEST_MATRIX)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("program", ["expert", "attend"])
def test_offloaded_decode_reads_integers(needs_gpu_compiler, program, kind):
    """A layer up to its router and one expert, of several sequences: programs of their own."""
    mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape())
    _, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
    )
    jobs, *_ = offload_jobs(CONFIG, abstract_offloaded(params, kind), mesh, 4, 64)
    (job,) = (job for job in jobs if job.name == f"decode step, {program}")
    text = hlo_text(compile_aot(job.program, job.args, mesh))
    needed = sum(
        stored_bytes(leaf) for leaf in jax.tree.leaves(job.args[0], is_leaf=is_quantized) if is_quantized(leaf)
    )
    arguments = traffic(text).arguments
    assert sum(arguments[i] for i in range(len(jax.tree.leaves(job.args[0])))) <= 1.1 * needed
    assert not largest_values(text, SMALLEST_MATRIX)
