"""1/N past the number of key/value heads, and no exchange and no byte moved that the layout does not call for."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

import sharding
from sharding import MeshShape
from sphinx_jax.config import DecoderConfig, SphinxConfig, preset
from sphinx_jax.costs import Cost, Workload, forward_flops, fraction_of_parameters
from sphinx_jax.hardware import find_gpu
from sphinx_jax.memory_plan.aot import compile_aot, planning_mesh
from sphinx_jax.memory_plan.hlo import collectives
from sphinx_jax.memory_plan.inference import inference_jobs
from sphinx_jax.model import SphinxMoE
from tests.instruments import largest_values, traffic

MESHES = [{"tensor": 8}, {"tensor": 8, "expert": 2}, {"tensor": 8, "expert": 4}]


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_one_device_holds_and_does_its_share(needs_gpu_compiler, shape):
    config = preset("sphinx-moe-1k")
    mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape(**shape))
    params = sharding.abstract_params(lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), mesh)[1]
    assert fraction_of_parameters(params) <= 1.02 / mesh.size
    flops = sum(forward_flops(config, params, mesh, Workload(1, 4096, 4096, 1, 1)).values(), Cost(0, 0))
    assert flops.per_device_max <= 1.05 * flops.total / mesh.size


LAYERS, MAX_MODEL_LEN = 2, 4096
CONFIG = SphinxConfig(DecoderConfig(num_layers=LAYERS), None)
"""Two of Mixtral-8x7B's layers: each of the others exchanges and reads the same."""


@pytest.fixture(scope="module")
def program(needs_gpu_compiler):
    """(mesh, name, rows) -> the mesh, the parameters, and a program of inference compiled for it, as text."""

    @functools.cache
    def compiled(axes, name, rows):
        mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape(**dict(axes)))
        make = lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs)
        graph, params = sharding.abstract_params(make, mesh, dtype=jnp.bfloat16)
        jobs, _ = inference_jobs(CONFIG, graph, params, mesh, rows, MAX_MODEL_LEN)
        job = next(job for job in jobs if job.name == name)
        return mesh, params, compile_aot(job.program, job.args, mesh).as_text()

    return lambda shape, name="decode one token", rows=1: compiled(tuple(shape.items()), name, rows)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_word_costs_two_reductions_a_layer_and_no_copy_of_weights(program, shape):
    mesh, _, text = program(shape)
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


@pytest.mark.parametrize("shape", [{}, *MESHES], ids=str)
def test_a_word_reads_the_weights_at_work_once(program, shape):
    """Within a tenth what two experts of each layer and all else weigh; with everything moved, 15 % of that and the
    cache."""
    _, params, text = program(shape)
    language = CONFIG.language

    def at_work(path, leaf):
        own = leaf.sharding.shard_shape(leaf.shape)
        if path[-1].key == "table":
            return own[1]
        experts = language.experts_per_token / own[0] if path[-1].key in ("w_in", "w_out") else 1
        return math.prod(own) * experts

    leaves = jax.tree_util.tree_leaves_with_path(params)
    active = 2 * sum(at_work(*entry) for entry in leaves)
    heads = max(language.num_kv_heads // shape.get("tensor", 1), 1)
    cache = LAYERS * 2 * MAX_MODEL_LEN * heads * language.head_dim * 2
    moved = traffic(text)
    read = sum(moved.arguments.get(i, 0) for i in range(len(leaves)))
    assert 0.99 * active <= read <= 1.10 * active
    assert read + cache <= moved.total <= 1.15 * (active + cache)


def test_replicas_exchange_no_more_than_the_words_they_choose(program):
    """Two answers on data 2 x tensor 4: one on each replica, and two reductions of its word a layer."""
    mesh, _, text = program({"data": 2, "tensor": 4}, rows=2)
    found = collectives(text, mesh)
    reduced = [c for c in found if c.kind == "all-reduce" and c.axes == ("tensor",)]
    assert [(c.count, c.bytes) for c in reduced] == [(2 * LAYERS, 2 * LAYERS * CONFIG.language.dim * 2)]
    # A token, its log-probability, and numbers that the loop ends with; the routers' scores would be 64 bytes a layer.
    assert sum(c.bytes for c in found if "data" in c.axes) <= 100


@pytest.mark.parametrize("name", ["read a prompt's beginning", "read on"])
@pytest.mark.parametrize("shape", [{"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_replicas_read_prompts_each_into_its_own_rows(program, shape, name):
    """Of what they read they exchange nothing but the words chosen after it, whichever rows it goes into.

    Beside the weights along fsdp, which decoding a word gathers as well.
    """
    mesh, _, text = program(shape, name, rows=8)
    found = collectives(text, mesh)
    reduced = [c for c in found if c.kind == "all-reduce" and c.axes == ("tensor",)]
    assert sum(c.count for c in reduced) == 2 * LAYERS
    # Two keys of one row and layer are 512 bytes.
    assert sum(c.bytes for c in found if "data" in c.axes) <= 200
    gathered = lambda found: sum(c.bytes for c in found if c.kind == "all-gather" and c.axes == ("fsdp",))
    if "fsdp" in shape:
        _, _, word = program(shape, rows=8)
        # The last word of each row goes through the head once more; keys of a chunk are megabytes.
        assert 0 <= gathered(found) - gathered(collectives(word, mesh)) <= 2 * CONFIG.language.dim
