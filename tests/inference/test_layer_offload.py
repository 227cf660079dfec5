"""Layers in host memory: the same numbers, and never more than two of them on the device."""

import dataclasses

import jax
import numpy as np
import pytest

import sharding
from sphinx_jax.checkpoints.loaded_model import Loaded
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.inference import generate, warmup
from sphinx_jax.inference.bucketing import SERVER_CHUNKS
from sphinx_jax.inference.layer_offload import OffloadEngine, in_host_memory
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import Scheduler
from sphinx_jax.model import SphinxMoE
from sphinx_jax.sphinx import Sphinx

QUESTIONS = ["what is the colour of the shape?", "is there a circle?", "is it red?"]


def to_host(keys, leaf):
    return in_host_memory(tuple(key.key for key in keys), leaf)


def offloaded(model: Sphinx) -> Sphinx:
    """The same model with its layers in host memory."""
    params = jax.tree_util.tree_map_with_path(to_host, model._params)
    loaded = Loaded(model.config, model.engine._programs.graph, params, model.tokenizer.model_bytes, model.mesh)
    return Sphinx(loaded, model.engine.max_model_len, offload=True)


@pytest.mark.parametrize("shape", [{}, {"tensor": 2, "expert": 2, "fsdp": 2}], ids=["one", "eight"])
def test_the_same_answers(shape, images, make_model):
    whole = make_model(**shape)
    model = offloaded(whole)
    tokens = np.random.default_rng(0).integers(0, 500, (2, 9))
    np.testing.assert_allclose(model.logits(tokens, images[:2]), whole.logits(tokens, images[:2]), atol=1e-5)
    prompt_images = [images[0], None, images[1]]
    assert model.generate(QUESTIONS, prompt_images, max_new_tokens=6) == whole.generate(
        QUESTIONS, prompt_images, max_new_tokens=6
    )


def test_chat_and_programs(model):
    """A chat continues where it was; layers share their programs, which are compiled once."""
    whole, model = model, offloaded(model)
    ours, theirs = model.chat(max_new_tokens=5), whole.chat(max_new_tokens=5)
    assert [ours.ask(question) for question in QUESTIONS] == [theirs.ask(question) for question in QUESTIONS]
    compiled = model.engine.compilations
    assert [ours.ask(question) for question in QUESTIONS] == [theirs.ask(question) for question in QUESTIONS]
    assert model.engine.compilations == compiled


def test_all_programs_are_compiled_ahead(model, images):
    whole, model = model, offloaded(model)
    shape = StateShape(num_seqs=2, cache_len=192, num_prefixes=2, prefix_len=32)
    warmup.compile_all(model.engine, shape)
    compiled, ended = model.engine.compilations, []
    scheduler = Scheduler(model.engine, shape, SERVER_CHUNKS)
    requests = [model.request(question, image) for question in QUESTIONS for image in (None, images[0], images[1])]
    requests = [dataclasses.replace(request, params=SamplingParams(max_new_tokens=5)) for request in requests]
    sequences = [scheduler.submit(request) for request in requests]
    while scheduler.has_work:
        ended += [sequence for sequence in scheduler.step() if sequence.finish]
    assert model.engine.compilations == compiled and len(ended) == len(requests)
    expected = generate.run_all(whole.engine, requests)
    assert [sequence.text for sequence in sequences] == [completion.text for completion in expected]


def device_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if array.sharding.memory_kind == "device")


def test_two_layers_on_the_device(monkeypatch, model):
    """Measured whenever a layer arrives: what is outside of the layers, the KV cache, and two layers at most."""
    language = DecoderConfig(
        dim=64, hidden_dim=256, num_layers=6, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=512
    )
    config = SphinxConfig(language=language, vision=None)
    before = device_bytes()
    mesh = sharding.make_mesh()
    graph, params = sharding.init_params(lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), 0, mesh)
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["language"]["layers"][0]))
    outside = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - 6 * layer
    params = jax.tree_util.tree_map_with_path(to_host, params)
    few_layers = Sphinx(Loaded(config, graph, params, model.tokenizer.model_bytes, mesh), 64, offload=True)
    seen = []
    fetch = OffloadEngine._fetch

    def watched(self, i):
        fetch(self, i)
        seen.append(device_bytes() - before)

    monkeypatch.setattr(OffloadEngine, "_fetch", watched)
    assert few_layers.generate(["is there a circle?"], max_new_tokens=4)
    state = few_layers.engine.new_state(StateShape(1, 96))
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert len(seen) >= 6 * 4
    assert max(seen) >= outside + 2 * layer, "two layers were never on the device together: nothing overlaps"
    # Besides: the hidden states between layers, the table of stop strings.
    assert max(seen) <= outside + 2 * layer + cache + 2**17 < outside + 3 * layer
