"""What is planned is what runs: the engine compiles the programs of the plan, for the same shapes."""

import jax
import numpy as np
import pytest

import sharding
import sphinx_jax
from sharding import Program
from sphinx_jax.inference import generate
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.memory_plan.inference import inference_jobs

MAX_MODEL_LEN = 1044
"""19 image tokens, two chunks of text, and two sampled tokens: one by prefill, one by a decode step."""


@pytest.fixture(scope="module")
def model():
    return sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=MAX_MODEL_LEN)


def shapes(tree):
    return [(np.shape(leaf), np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


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
