"""A decode step updates the KV cache in place on a CPU, checked in the compiled program."""

import pytest

import sharding
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.memory_plan.hlo import parse
from sphinx_jax.memory_plan.inference import inference_jobs
from sphinx_jax.model import SphinxMoE

pytestmark = pytest.mark.optimized

CONFIG = SphinxConfig(
    DecoderConfig(dim=64, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=2, vocab_size=64), None
)


@pytest.mark.parametrize("num_seqs", [1, 2])
def test_decode_updates_the_cache_in_place(num_seqs):
    """No copy, transpose, broadcast or select as large as a layer's keys; only dynamic-update-slices."""
    mesh = sharding.make_mesh()
    graph, params = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh)
    job = inference_jobs(CONFIG, graph, params, mesh, num_seqs, 512)[0][-1]
    cache = job.args[1].cache[0].k
    computations, _ = parse(job.program.compile(job.args, mesh).as_text())
    cache_sized = [i for body in computations.values() for i in body if i.type.startswith(_text(cache.shape))]
    assert {i.opcode for i in cache_sized} >= {"parameter", "dynamic-update-slice"}
    assert [i.name for i in cache_sized if i.opcode in ("copy", "transpose", "broadcast", "select")] == []


def _text(shape: tuple[int, ...]) -> str:
    return f"f32[{','.join(map(str, shape))}]"
