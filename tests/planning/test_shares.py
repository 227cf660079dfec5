"""1/N past the number of key/value heads, and no exchange that the layout does not call for."""

import jax.numpy as jnp
import pytest

import sharding
from sharding import MeshShape
from sharding.plan import collectives, compile_ahead, find_gpu, largest_values, planning_mesh
from sphinx_jax.config import DecoderConfig, SphinxConfig, preset
from sphinx_jax.costs import Cost, Work, forward_flops, share_of_parameters
from sphinx_jax.model import SphinxMoE
from sphinx_jax.planning.inference import inference_jobs

MESHES = [{"tensor": 8}, {"tensor": 8, "expert": 2}, {"tensor": 8, "expert": 4}]


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_one_device_holds_and_does_its_share(needs_gpu_compiler, shape):
    config = preset("sphinx-moe-1k")
    mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape(**shape))
    params = sharding.abstract_params(lambda rngs: SphinxMoE(config, apart=True, rngs=rngs), mesh)[1]
    assert share_of_parameters(params) <= 1.02 / mesh.size
    flops = sum(forward_flops(config, params, mesh, Work(1, 4096, 4096, 1, 1)).values(), Cost(0, 0))
    assert flops.busiest <= 1.05 * flops.total / mesh.size


LAYERS = 2
CONFIG = SphinxConfig(DecoderConfig(num_layers=LAYERS), None)
"""Two of Mixtral-8x7B's layers: each of the others exchanges and reads the same."""


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_word_costs_two_reductions_a_layer_and_no_copy_of_weights(needs_gpu_compiler, shape):
    mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape(**shape))
    make = lambda rngs: SphinxMoE(CONFIG, apart=True, rngs=rngs)
    graph, params = sharding.abstract_params(make, mesh, dtype=jnp.bfloat16)
    jobs, _ = inference_jobs(CONFIG, graph, params, mesh, rows=1, context=4096)
    job = next(job for job in jobs if job.name == "decode one token")
    text = compile_ahead(job.program, job.args, mesh).as_text()
    model = tuple(axis for axis in ("expert", "tensor") if shape.get(axis, 1) > 1)
    reduced = {c.axes: c for c in collectives(text, mesh) if c.kind == "all-reduce"}
    assert (reduced[model].count, reduced[model].bytes) == (2 * LAYERS, 2 * LAYERS * CONFIG.language.dim * 2)
    # Devices that share a key/value head add up its projection, which is split over them along the input.
    shared = reduced.get(("expert",))
    assert (shared.count if shared else 0) == (LAYERS if "expert" in shape else 0)
    others = [c for c in collectives(text, mesh) if c.kind != "all-reduce"]
    assert sum(c.bytes for c in others) <= 2 * (CONFIG.language.dim + CONFIG.language.vocab_size)
    # One matrix of one expert is 14 MiB; cuBLAS gets a workspace of 4.
    assert largest_values(text, 5 * 2**20) == []
