"""1/N of parameters and FLOPs past the number of KV heads; no collective and no memory traffic beyond the layout's."""

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
from sphinx_jax.memory_plan.aot import compile_aot, hlo_text, planning_mesh
from sphinx_jax.memory_plan.hlo import collectives
from sphinx_jax.memory_plan.inference import inference_jobs
from sphinx_jax.model import SphinxMoE
from tests.instruments import largest_values, traffic

pytestmark = pytest.mark.optimized

MESHES = [{"tensor": 8, "expert": 2}, {"tensor": 8, "expert": 4}]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_fraction_of_one_device(needs_gpu_compiler, shape):
    config = preset("sphinx-moe-1k")
    mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape(**shape))
    params = sharding.abstract_params(lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), mesh)[1]
    assert fraction_of_parameters(params) <= 1.02 / mesh.size
    flops = sum(forward_flops(config, params, mesh, Workload(1, 4096, 4096, 1, 1)).values(), Cost(0.0, 0.0))
    assert flops.per_device_max <= 1.05 * flops.total / mesh.size


LAYERS, MAX_MODEL_LEN = 2, 4096
CONFIG = SphinxConfig(DecoderConfig(num_layers=LAYERS), None)
"""Two layers of Mixtral-8x7B: all others have the same collectives and memory traffic."""


@pytest.fixture(scope="module")
def program(needs_gpu_compiler):
    """(mesh, name, max_num_seqs) -> the mesh, the parameters, and the HLO text of an inference program."""

    @functools.cache
    def compiled(axes, name, max_num_seqs):
        mesh, _ = planning_mesh(find_gpu("a100-80gb"), MeshShape(**dict(axes)))
        graph, params = sharding.abstract_params(
            lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh, dtype=jnp.bfloat16
        )
        jobs, _ = inference_jobs(CONFIG, graph, params, mesh, max_num_seqs, MAX_MODEL_LEN)
        job = next(job for job in jobs if job.name == name)
        return mesh, params, hlo_text(compile_aot(job.program, job.args, mesh))

    return lambda shape, name="decode step", max_num_seqs=1: compiled(tuple(shape.items()), name, max_num_seqs)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_decode_step_has_two_all_reduces_per_layer_and_no_copy_of_weights(program, shape):
    """With tensor alone test_fits.py shows it, of the whole model."""
    mesh, _, text = program(shape)
    reduced = {c.axes: c for c in collectives(text, mesh) if c.kind == "all-reduce"}
    both = reduced["expert", "tensor"]
    assert (both.count, both.bytes) == (2 * LAYERS, 2 * LAYERS * CONFIG.language.dim * 2)
    # Devices that share a KV head all-reduce its projection, which is sharded over them along the input.
    assert reduced["expert",].count == LAYERS
    others = [c for c in collectives(text, mesh) if c.kind != "all-reduce"]
    assert sum(c.bytes for c in others) <= 2 * (CONFIG.language.dim + CONFIG.language.vocab_size)
    # One matrix of one expert is 14 MiB; the cuBLAS workspace is 4 MiB.
    assert largest_values(text, 5 * 2**20) == []


@pytest.mark.parametrize("shape", [{}, *MESHES], ids=str)
def test_decode_step_reads_the_active_weights_once(program, shape):
    """Reads of weights are within 10 % of the active parameters; all traffic within 15 % of those and the KV cache."""
    _, params, text = program(shape)
    language = CONFIG.language

    def active_elements(path, leaf):
        """Elements on one device that a token uses: its row of the embedding, its experts, all else."""
        local = leaf.sharding.shard_shape(leaf.shape)
        if path[-1].key == "table":
            return local[1]
        experts = language.experts_per_token / local[0] if path[-1].key in ("w_in", "w_out") else 1
        return math.prod(local) * experts

    leaves = jax.tree_util.tree_leaves_with_path(params)
    active = 2 * sum(active_elements(*path_and_leaf) for path_and_leaf in leaves)
    heads = max(language.num_kv_heads // shape.get("tensor", 1), 1)
    cache = LAYERS * 2 * MAX_MODEL_LEN * heads * language.head_dim * 2
    moved = traffic(text)
    read = sum(moved.arguments.get(i, 0) for i in range(len(leaves)))
    assert 0.99 * active <= read <= 1.10 * active
    assert read + cache <= moved.total <= 1.15 * (active + cache)


def test_replicas_communicate_sampled_tokens_only(program):
    """Two sequences on data 2 x tensor 4: one per replica, with two all-reduces of its token per layer."""
    mesh, _, text = program({"data": 2, "tensor": 4}, max_num_seqs=2)
    found = collectives(text, mesh)
    reduced = [c for c in found if c.kind == "all-reduce" and c.axes == ("tensor",)]
    assert [(c.count, c.bytes) for c in reduced] == [(2 * LAYERS, 2 * LAYERS * CONFIG.language.dim * 2)]
    # A token, its log-probability, and the scalars of the loop condition; router logits would be 64 bytes per layer.
    # In a branch that is taken if someone asks: the 20 most probable tokens of each sequence, with theirs.
    assert sum(c.bytes for c in found if "data" in c.axes) <= 100 + 2 * 20 * (4 + 4)


@pytest.mark.parametrize(
    ("shape", "name"),
    [({"data": 2, "tensor": 4}, "prefill"), ({"data": 2, "fsdp": 2, "tensor": 2}, "chunked prefill")],
    ids=str,
)
def test_replicas_prefill_their_own_batch_slots(program, shape, name):
    """Prefill communicates sampled tokens only between replicas, whichever batch slots it fills.

    Weights are all-gathered along fsdp, as in a decode step.
    """
    mesh, _, text = program(shape, name, max_num_seqs=8)
    found = collectives(text, mesh)
    reduced = [c for c in found if c.kind == "all-reduce" and c.axes == ("tensor",)]
    assert sum(c.count for c in reduced) == 2 * LAYERS
    # Two keys of one sequence and layer are 512 bytes. And the most probable tokens of a chunk of 16.
    assert sum(c.bytes for c in found if "data" in c.axes) <= 200 + 16 * 20 * (4 + 4)
    if "fsdp" in shape:
        decode_step = collectives(program(shape, max_num_seqs=8)[2], mesh)
        prefill_bytes, decode_bytes = (
            sum(c.bytes for c in collected if c.kind == "all-gather" and c.axes == ("fsdp",))
            for collected in (found, decode_step)
        )
        # Last tokens for the head, sharded over tensor: a chunk is padded to 8 sequences per replica, a decode step has
        # 4. Keys of a chunk are megabytes.
        assert 0 <= prefill_bytes - decode_bytes <= (8 - 4) * 2 * CONFIG.language.dim // shape["tensor"]
