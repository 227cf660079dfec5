"""What is planned is what runs: the engine and the loop compile the same functions for the same shapes."""

import jax
import numpy as np
import pytest

import sharding
import sphinx_jax
from sharding import Program
from sphinx_jax.inference.requests import Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.serving import answer_all
from sphinx_jax.memory_plan.inference import inference_jobs

MAX_MODEL_LEN = 1044
"""A picture of 19 words, two whole chunks of text, and one word to say."""


@pytest.fixture(scope="module")
def model():
    return sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=MAX_MODEL_LEN)


def shapes(tree):
    return [(np.shape(leaf), np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_engines_programs(model, monkeypatch, replicas):
    """Prompts as long as the context, one a replica: all that is compiled is in the plan, argument by argument."""
    if replicas > 1:
        model = sphinx_jax.load(
            sphinx_jax.SHIPPED, sharding.make_mesh(data=replicas), "float32", max_model_len=MAX_MODEL_LEN
        )
    ran = []
    original = Program.compile
    monkeypatch.setattr(Program, "compile", lambda self, args, mesh: ran.append(args) or original(self, args, mesh))
    tokens = model.tokenizer.encode("circle " * 1000, bos=True, eos=False)[
        : MAX_MODEL_LEN - model.config.num_image_tokens - 1
    ]
    picture = lambda i: model.picture(np.full((64, 64, 3), i, np.uint8))
    answer_all(model.engine, [Request(tokens, picture(i), 1) for i in range(replicas)], SamplingParams())
    jobs, _ = inference_jobs(model.config, None, model.engine.params, model.mesh, replicas, MAX_MODEL_LEN)
    planned = [shapes(job.args) for job in jobs]
    for args in filter(None, ran):
        assert shapes(args) in planned
    assert len([args for args in ran if args]) == len(planned)
