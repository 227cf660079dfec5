"""Experts in host memory: the same numbers as the whole model's, exactly the copies that its routing needs, and no more
device memory than allowed.
"""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax.checkpoints.loaded_model import Loaded
from sphinx_jax.config import SphinxConfig, preset
from sphinx_jax.errors import UserError
from sphinx_jax.inference import generate, offload_engine, warmup
from sphinx_jax.inference.bucketing import SERVER_CHUNKS
from sphinx_jax.inference.expert_cache import SPARE, ExpertCache
from sphinx_jax.inference.offload_engine import OffloadEngine
from sphinx_jax.inference.offload_params import encoders_of, offloaded
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.scheduler import Scheduler
from sphinx_jax.model import SphinxMoE, bind
from sphinx_jax.sphinx import Sphinx
from tests.inference.conftest import CONFIG, random_model, tokenizer_bytes

QUESTIONS = ["what is the colour of the shape?", "is there a circle?", "is it red?"]
KEPT = [2, 3, 8]
"""Experts a layer."""


def move_experts(params):
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: offloaded(tuple(k.key for k in keys), leaf), params)


def offload(model: Sphinx) -> Sphinx:
    """The same model with its experts in host memory."""
    params = move_experts(model._params)
    loaded = Loaded(model.config, model.engine._programs.graph, params, model.tokenizer.model_bytes, model.mesh)
    return Sphinx(loaded, model.engine.max_model_len, offload=True)


def cache_of(model: Sphinx) -> ExpertCache:
    assert isinstance(model.engine, OffloadEngine)
    return model.engine.cache


def keep(monkeypatch, model: Sphinx, per_layer: int) -> ExpertCache:
    """The model's cache, from now on of so many experts a layer."""
    cache = cache_of(model)
    language = model.config.language
    kept = min(per_layer, language.num_experts) * language.num_layers
    monkeypatch.setattr(offload_engine, "best_fit", lambda *args: (kept, False))
    cache.resize(kept)
    cache.hits = cache.misses = 0
    return cache


@pytest.fixture(scope="module")
def small(make_model):
    return offload(make_model())


@pytest.fixture(scope="module")
def nano():
    """nano on one device: (whole, offloaded)."""
    load = {"mesh": sharding.make_mesh(), "max_model_len": 128}
    return sphinx_jax.load(sphinx_jax.SHIPPED, **load), sphinx_jax.load(sphinx_jax.SHIPPED, offload=True, **load)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"tensor": 2, "expert": 2, "fsdp": 2}, {"data": 2, "expert": 4}], ids=str)
def test_meshes(shape, images, make_model, monkeypatch):
    whole = make_model(**shape)
    model = offload(whole)
    cache = keep(monkeypatch, model, 2)
    ours, theirs = (m.complete(QUESTIONS[:2], images[:2], max_new_tokens=6) for m in (model, whole))
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in theirs]
    # Each device has its part of every expert.
    num_parts = shape.get("tensor", 1) * shape["expert"] * shape.get("fsdp", 1)
    w_in = cache._experts[0][0]["w_in"]
    assert w_in.sharding.memory_kind == "pinned_host"
    assert w_in.addressable_shards[0].data.nbytes * num_parts == w_in.nbytes
    assert cache.misses


@pytest.mark.slow
def test_copies_are_those_of_the_routing(nano, monkeypatch):
    """The whole model's routing of prompt and answer says which experts are copied when two of four are kept."""
    whole, model = nano
    cache = keep(monkeypatch, model, 2)
    request = model.request(QUESTIONS[0], params=SamplingParams(max_new_tokens=12, ignore_eos=True))
    (completion,) = generate.run_all(model.engine, [request])
    assert completion.tokens == generate.run_all(whole.engine, [request])[0].tokens
    assert len(completion.tokens) == 12
    tokens = jnp.array([[*request.tokens, *completion.tokens[:-1]]])
    layers = bind(whole.engine._programs.graph, whole._params)(tokens)[1]["layers"]
    misses = used = 0
    for layer in layers:
        experts, last = np.asarray(layer["routing"].experts[0]), []
        prompt = len(request.tokens)
        for selected in (experts[:prompt], *experts[prompt:]):
            selected = np.unique(selected).tolist()
            new = [i for i in selected if i not in last]
            last = [*last, *(i for i in selected if i in last), *new]
            last = [i for at, i in enumerate(last) if i not in last[at + 1 :]][-2:]
            misses += len(new)
            used += len(selected)
    assert (cache.misses, cache.hits) == (misses, used - misses)
    assert 0 < misses < used
    assert cache.bytes_copied == misses * sum(leaf.nbytes for leaf in jax.tree.leaves(cache._experts[0][0]))


@pytest.mark.slow
@pytest.mark.parametrize("kept", KEPT)
def test_nano(nano, monkeypatch, kept):
    whole, model = nano
    keep(monkeypatch, model, kept)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    images = [pixels[0], None]
    ours, theirs = (m.complete(QUESTIONS[:2], images, max_new_tokens=8, top_logprobs=3) for m in (model, whole))
    for own, other in zip(ours, theirs, strict=True):
        assert (own.tokens, own.text, own.finish) == (other.tokens, other.text, other.finish)
        np.testing.assert_allclose(own.logprobs, other.logprobs, atol=1e-5)
        assert [top.tokens for top in own.top_logprobs] == [top.tokens for top in other.top_logprobs]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int4", "bfloat16"])
def test_number_formats(dtype, monkeypatch):
    options = {"dtype": dtype} if dtype == "bfloat16" else {"quantize": dtype}
    load = {"mesh": sharding.make_mesh(), "max_model_len": 128, **options}
    whole, model = (
        sphinx_jax.load(sphinx_jax.SHIPPED, **load),
        sphinx_jax.load(sphinx_jax.SHIPPED, offload=True, **load),
    )
    cache = keep(monkeypatch, model, 2)
    (own,), (other,) = (m.complete(QUESTIONS[:1], max_new_tokens=4, ignore_eos=True) for m in (model, whole))
    assert own.tokens == other.tokens
    np.testing.assert_allclose(own.logprobs, other.logprobs, atol=0.1 if dtype == "bfloat16" else 1e-4)
    bits = {"int4": 4.5, "bfloat16": 16}[dtype]
    assert 1 <= cache.expert_bytes / (3 * 96 * 192 * bits / 8) < 1.11
    assert model.settings() == whole.settings()


@pytest.mark.slow
@pytest.mark.parametrize("kept", KEPT)
def test_golden_model(golden_checkpoint, golden, monkeypatch, kept):
    """As `test_golden`: what the original program answered."""
    model = golden_model(golden_checkpoint("ens", 1))
    keep(monkeypatch, model, kept)
    scenario = next(s for s in golden("ens/expected.json")["generate"] if s["name"] == "text_only_batch3")
    answers = model.complete(scenario["prompts"], raw=True, max_new_tokens=31)
    for answer, tokens in zip(answers, scenario["output_tokens"], strict=True):
        assert answer.tokens[: len(tokens)] == tokens


def golden_model(path, made={}) -> Sphinx:  # noqa: B006
    """Loaded once."""
    if path not in made:
        made[path] = sphinx_jax.load(path, sharding.make_mesh(), "float32", offload=True, max_model_len=256)
    return made[path]


@pytest.mark.slow
def test_mixtral_140m(monkeypatch):
    """Two of its layers: those of the whole model are compiled one by one, and all alike."""
    config, mesh = preset("mixtral-140m"), sharding.make_mesh()
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, num_layers=2))
    graph, params = sharding.init_params(lambda rngs: SphinxMoE(config, unstacked=True, rngs=rngs), 0, mesh)
    whole = Sphinx(Loaded(config, graph, params, tokenizer_bytes(), mesh), 64)
    model = offload(whole)
    expected = whole.complete(QUESTIONS, raw=True, max_new_tokens=16, ignore_eos=True)
    for kept in KEPT:
        cache = keep(monkeypatch, model, kept)
        answers = model.complete(QUESTIONS, raw=True, max_new_tokens=16, ignore_eos=True)
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
        assert cache.hits + cache.misses > 16 * 2


@pytest.mark.slow
def test_chat(model, small):
    """A chat continues where it was; layers and experts share their programs, which are compiled once."""
    tokens = np.random.default_rng(0).integers(0, 500, (2, 9))
    np.testing.assert_allclose(small.logits(tokens), model.logits(tokens), atol=1e-5)
    ours, theirs = small.chat(max_new_tokens=5), model.chat(max_new_tokens=5)
    assert [ours.ask(question) for question in QUESTIONS] == [theirs.ask(question) for question in QUESTIONS]
    compiled = set(small.engine._compiled)
    assert [ours.ask(question) for question in QUESTIONS] == [theirs.ask(question) for question in QUESTIONS]
    # How many cache positions are read depends on the clock: as many steps as fit between two deliveries.
    assert {key[0] for key in set(small.engine._compiled) - compiled} <= {"decode attend"}


@pytest.mark.slow
def test_all_programs_are_compiled_ahead(model, images, monkeypatch):
    """With prefix reuse, top log-probabilities and a cancelled sequence: nothing is compiled for a request."""
    whole, model = model, offload(model)
    keep(monkeypatch, model, 2)
    shape = StateShape(num_seqs=2, cache_len=192, num_prefixes=2, prefix_len=32)
    chunks = SERVER_CHUNKS._replace(lengths=(128,), batches=(1,))
    warmup.compile_all(model.engine, shape, chunks)
    compiled = model.engine.compilations
    requests = [model.request(question, image) for question in QUESTIONS for image in (None, images[0], images[1])]
    params = SamplingParams(max_new_tokens=5, top_logprobs=2)
    requests = [dataclasses.replace(request, params=params) for request in requests]
    served = []
    for engine in (model.engine, whole.engine):
        scheduler = Scheduler(engine, shape, chunks)
        sequences = [scheduler.submit(request) for request in requests]
        extra = scheduler.submit(requests[0], streams=True)
        while scheduler.has_work:
            scheduler.step()
            scheduler.cancel(extra)
        assert extra.finish == "cancelled"
        served.append((sequences, scheduler.tokens_reused, scheduler.tokens_prefilled))
    assert model.engine.compilations == compiled
    (ours, *ours_counted), (theirs, *theirs_counted) = served
    assert ours_counted == theirs_counted and ours_counted[0]
    for own, other in zip(ours, theirs, strict=True):
        assert (own.tokens, own.finish) == (other.tokens, other.finish)
        assert [top.tokens for top in own.completion.top_logprobs] == [
            top.tokens for top in other.completion.top_logprobs
        ]


def device_bytes() -> int:
    """Of all arrays on the first device."""
    arrays = (a for a in jax.live_arrays() if a.sharding.memory_kind == "device")
    return sharding.bytes_per_device([a for a in arrays if jax.devices()[0] in a.sharding.device_set])


@pytest.mark.slow
def test_device_memory_is_limited(images, monkeypatch):
    """A limit below the model's size: the encoders go to host memory, and experts stay under it at every moment."""
    assert CONFIG.vision is not None and CONFIG.vision.clip is not None
    clip = dataclasses.replace(CONFIG.vision.clip, width=128)
    config = SphinxConfig(
        dataclasses.replace(CONFIG.language, hidden_dim=1024), dataclasses.replace(CONFIG.vision, clip=clip)
    )
    model = random_model(config, 128)
    params = move_experts(model._params)
    # Copies, which nobody else holds.
    params |= {"vision": jax.tree.map(lambda leaf: leaf.copy(), params["vision"])}
    gc.collect()
    before = device_bytes()
    engine = OffloadEngine(config, params, model.tokenizer, model.mesh, 128)
    encoders = sharding.bytes_per_device(encoders_of(params))
    del params
    shape = StateShape(1, 128)
    limited = dataclasses.replace(
        model.request(QUESTIONS[0], images[0]), params=SamplingParams(max_new_tokens=6, ignore_eos=True)
    )
    monkeypatch.setattr(offload_engine, "IMAGE_CACHE_BYTES", 0)
    chunks = SERVER_CHUNKS._replace(lengths=(32,), batches=(1,))
    warmup.compile_all(engine, shape, chunks)

    def serve():
        scheduler = Scheduler(engine, shape, chunks)
        sequence = scheduler.submit(limited)
        while scheduler.has_work:
            scheduler.step()
        return sequence.tokens

    expected = serve()
    assert engine.cache.kept == engine.cache.num_experts and not engine._encoders_in_host_memory
    engine.cache.resize(0)
    engine.forget_images()
    room = engine.state_bytes(shape) + engine.working_bytes + engine._hidden_bytes + 2**16
    # One of eight experts, and more in the encoders' place.
    engine.device_bytes = before + room + (1 + SPARE) * engine.cache.expert_bytes
    kept, seen, compute, encode = [], [], ExpertCache.compute, OffloadEngine._run_encoders

    def watched(self, layer, selected, run, x):
        def run_and_see(i, expert, x):
            x = run(i, expert, x)
            seen.append(device_bytes())
            return x

        x = compute(self, layer, selected, run_and_see, x)
        kept.append(self.device_bytes // self.expert_bytes)
        return x

    def watched_encode(self, images):
        embeds = encode(self, images)
        seen.append(device_bytes())
        return embeds

    monkeypatch.setattr(ExpertCache, "compute", watched)
    monkeypatch.setattr(OffloadEngine, "_run_encoders", watched_encode)
    assert serve() == expected
    assert engine._encoders_in_host_memory
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(engine._encoder_params)} == {"pinned_host"}
    more = encoders // engine.cache.expert_bytes
    assert more >= 1 and max(kept) == 1 + more < 8
    assert len(seen) > 6 * 2 and max(seen) <= engine.device_bytes
    engine.forget_images()


def test_what_needs_all_experts_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="without --offload"):
        small.engine.prompt_logprobs([1, 2, 3])
    with pytest.raises(UserError, match="without --offload"):
        small.engine.expert_load([[1, 2, 3]], None)
    with pytest.raises(UserError, match="cannot be saved"):
        small.save(tmp_path / "copy")
