"""What decoding moves of the cache on a CPU, read off the compiled program."""

import pytest

import sharding
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.memory_plan.hlo import parse
from sphinx_jax.memory_plan.inference import inference_jobs
from sphinx_jax.model import SphinxMoE

CONFIG = SphinxConfig(
    DecoderConfig(dim=64, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, num_experts=2, vocab_size=64), None
)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_word_is_written_where_the_cache_lies(rows):
    """Nothing as large as a layer's keys is written but the keys and values of the word, each into the cache."""
    mesh = sharding.make_mesh()
    graph, params = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, unstacked=True, rngs=rngs), mesh)
    job = inference_jobs(CONFIG, graph, params, mesh, rows, 512)[0][-1]
    cache = job.args[1].cache[0].k
    computations, _ = parse(job.program.compile(job.args, mesh).as_text())
    as_large = [i for body in computations.values() for i in body if i.type.startswith(_text(cache.shape))]
    assert {i.opcode for i in as_large} >= {"parameter", "dynamic-update-slice"}
    assert [i.name for i in as_large if i.opcode in ("copy", "transpose", "broadcast", "select")] == []


def _text(shape: tuple[int, ...]) -> str:
    return f"f32[{','.join(map(str, shape))}]"
