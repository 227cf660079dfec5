"""What is planned is what runs: the engine compiles the programs of the plan, for the same shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import sphinx_jax
from sharding import Program
from sphinx_jax.inference import generate
from sphinx_jax.inference.expert_cache import SPARE
from sphinx_jax.inference.offload_engine import OffloadEngine
from sphinx_jax.inference.offload_params import abstract_offloaded
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.memory_plan.inference import inference_jobs
from sphinx_jax.memory_plan.offload import offload_jobs
from sphinx_jax.model import SphinxMoE

pytestmark = pytest.mark.optimized

MAX_MODEL_LEN = 1044
"""19 image tokens, two chunks of text, and two sampled tokens: one by prefill, one by a decode step."""

ONE_CHUNK_LEN = 1040
"""19 image tokens and a chunk of 1,024, which offload prefills at once."""


@pytest.fixture(scope="module")
def model():
    return sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=MAX_MODEL_LEN)


def shapes(tree):
    return [(np.shape(leaf), np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_programs_of_the_engine(model, monkeypatch, replicas):
    """With the longest prompts, one per replica, all compiled programs are in the plan, argument by argument."""
    if replicas > 1:
        model = sphinx_jax.load(
            sphinx_jax.SHIPPED, sharding.make_mesh(data=replicas), "float32", max_model_len=MAX_MODEL_LEN
        )
    compiled = []
    original = Program.compile
    monkeypatch.setattr(
        Program, "compile", lambda self, args, mesh: compiled.append(args) or original(self, args, mesh)
    )
    tokens = model.tokenizer.encode("circle " * 1000, bos=True, eos=False)[
        : MAX_MODEL_LEN - model.config.num_image_tokens - 2
    ]
    images = [model.prepare_image(np.full((64, 64, 3), i, np.uint8)) for i in range(replicas)]
    requests = [Request(tokens, image, SamplingParams(max_new_tokens=2)) for image in images]
    generate.run_all(model.engine, requests)
    jobs, _ = inference_jobs(model.config, None, model.engine.params, model.mesh, replicas, MAX_MODEL_LEN)
    planned = [shapes(job.args) for job in jobs]
    for args in filter(None, compiled):
        assert shapes(args) in planned
    assert len([args for args in compiled if args]) == len(planned)


@pytest.mark.slow
def test_programs_of_the_offload_engine(monkeypatch):
    """The same with experts in host memory: a chunk and a decode step are four programs each."""
    mesh = sharding.make_mesh()
    model = sphinx_jax.load(sphinx_jax.SHIPPED, mesh, "float32", max_model_len=ONE_CHUNK_LEN, offload=True)
    compiled = []
    original = Program.compile
    monkeypatch.setattr(
        Program, "compile", lambda self, args, mesh: compiled.append(args) or original(self, args, mesh)
    )
    tokens = model.tokenizer.encode("circle " * 1000, bos=True, eos=False)[
        : ONE_CHUNK_LEN - model.config.num_image_tokens - 2
    ]
    image = model.prepare_image(np.zeros((64, 64, 3), np.uint8))
    generate.run_all(model.engine, [Request(tokens, image, SamplingParams(max_new_tokens=2))])
    _, params = sharding.abstract_params(
        lambda rngs: SphinxMoE(model.config, unstacked=True, rngs=rngs), mesh, dtype=jnp.float32
    )
    jobs, _, on_device, sizes = offload_jobs(model.config, abstract_offloaded(params), mesh, 1, ONE_CHUNK_LEN)
    planned = [shapes(job.args) for job in jobs]
    assert len(planned) == 1 + 4 + 4
    for args in filter(None, compiled):
        assert shapes(args) in planned
    assert len([args for args in compiled if args]) == len(planned)
    assert isinstance(model.engine, OffloadEngine)
    cache = model.engine.cache
    assert (sizes.expert_bytes, sizes.num_layers * sizes.num_experts) == (cache.expert_bytes, cache.num_experts)
    held = sharding.bytes_per_device([model.engine.all_params, [cache.abstract_expert] * SPARE])
    assert sharding.bytes_per_device(on_device) == held
