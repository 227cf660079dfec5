"""Adapters that are served together against each of them merged into the base, alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints import adapters
from sphinx_jax.errors import UserError
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.scheduler import Scheduler
from sphinx_jax.quantization import quantized
from tests.instruments.adapters import save_adapters, save_base

PROMPTS = ["3 plus 4?", "17 plus 2?", "3 plus 4?", "8 plus 8 plus 8?", "5?", "17 plus 2?"]
CHOSEN = ["mine", "theirs", None, "mine", "theirs", None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def directories(base):
    return save_adapters(base)


@pytest.fixture(scope="module")
def served(base, directories):
    return sphinx_jax.load(base, sharding.make_mesh(), max_model_len=256, adapters=directories)


def merged(base, directory, mesh=None):
    """The base with one set of adapters in its matrices."""
    source = checkpoints.open(base)
    source = source if directory is None else adapters.with_adapters(source, directory)
    return sphinx_jax.Sphinx(checkpoints.load(source, mesh or sharding.make_mesh()), max_model_len=256)


@pytest.fixture(scope="module")
def alone(base, directories):
    """Each model by itself, and its answers to the prompts."""
    models = {name: merged(base, directory) for name, directory in {**directories, None: None}.items()}
    return models, {name: model.complete(PROMPTS, max_new_tokens=12) for name, model in models.items()}


def test_logits_of_each_adapter_and_of_the_base(served, alone):
    tokens = np.random.default_rng(0).integers(1, 300, (2, 24))
    found = {name: served.logits(tokens, adapter=name) for name in alone[0]}
    for name, model in alone[0].items():
        expected = np.asarray(model.logits(tokens))
        assert np.abs(found[name] - expected).max() < 1e-5 * np.abs(expected).max(), name
    assert np.abs(found["mine"] - found[None]).max() > 0.1 * np.abs(found[None]).max()
    assert np.abs(found["theirs"] - found[None]).max() > 0.1 * np.abs(found[None]).max()
    for name in alone[0]:
        scored = served.engine.prompt_logprobs(tokens[0].tolist(), name)
        logprobs = jax.nn.log_softmax(alone[0][name].logits(tokens[:1])[0])
        expected = [logprobs[i, token] for i, token in enumerate(tokens[0, 1:])]
        np.testing.assert_allclose(scored.logprobs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_num_seqs", [6, 1], ids=["one batch", "one after the other"])
def test_mixed_batch_equals_each_alone(served, alone, max_num_seqs):
    completions = served.complete(PROMPTS, adapter=CHOSEN, max_new_tokens=12, max_num_seqs=max_num_seqs)
    for i, (name, completion) in enumerate(zip(CHOSEN, completions, strict=True)):
        expected = alone[1][name][i]
        assert completion.tokens == expected.tokens, name
        np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-4)
    assert len({tuple(answers[0].tokens) for answers in alone[1].values()}) == 3


@pytest.mark.slow
def test_streams_and_chats_use_the_adapter(served, alone):
    for name, answers in alone[1].items():
        assert "".join(served.stream(PROMPTS[0], adapter=name, max_new_tokens=12)) == answers[0].text
        assert served.chat(adapter=name, max_new_tokens=12).ask(PROMPTS[0]) == answers[0].text


@pytest.mark.slow
def test_prefixes_are_reused_with_the_same_adapter_only(served, alone):
    """One long prompt, four times over two slots and a pool: the third and fourth find their own adapter's."""
    prompt, engine = "1 plus 2 plus 3 plus " * 12, served.engine
    scheduler = Scheduler(engine, StateShape(2, 512, 2, 256))
    reused, texts = [], {}
    for name in ("mine", None, "mine", None, "theirs"):
        sequence, before = scheduler.submit(served.request(prompt, adapter=name)), scheduler.tokens_reused
        while sequence.finish is None:
            scheduler.step()
        reused.append(scheduler.tokens_reused - before)
        texts.setdefault(name, []).append(sequence.completion.tokens[:12])
    assert reused[0] == reused[1] == reused[4] == 0
    assert min(reused[2:4]) > 100
    for name, tokens in texts.items():
        expected = alone[0][name].complete([prompt], max_new_tokens=12)[0].tokens
        assert all(own[: len(expected)] == expected for own in tokens), name


def test_mesh_of_eight_devices(base, directories, alone):
    mesh = sharding.make_mesh(data=2, expert=2, tensor=2)
    model = sphinx_jax.load(base, mesh, max_model_len=256, adapters=directories)
    completions = model.complete(PROMPTS, adapter=CHOSEN, max_new_tokens=12)
    for i, (name, completion) in enumerate(zip(CHOSEN, completions, strict=True)):
        assert completion.tokens == alone[1][name][i].tokens, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_base(base, directories, tmp_path, kind):
    """The reference has the dequantized matrices as its base."""

    def dequantized(path, param):
        quantized_param = quantized(path, param, kind)
        return quantized_param if quantized_param is param else quantized_param.astype(jnp.float32)

    loaded = checkpoints.load(base, sharding.make_mesh(), transform=dequantized)
    checkpoints.save(tmp_path / "dequantized", loaded.config, loaded.params, loaded.tokenizer_bytes)
    tokens = np.random.default_rng(0).integers(1, 300, (2, 24))
    model = sphinx_jax.load(base, sharding.make_mesh(), quantize=kind, adapters=directories, max_model_len=256)
    for name, directory in directories.items():
        expected = np.asarray(merged(tmp_path / "dequantized", directory).logits(tokens))
        assert np.abs(model.logits(tokens, adapter=name) - expected).max() < 1e-5 * np.abs(expected).max()


def test_without_adapters_nothing_is_added(base, served):
    """The arrays that programs take are those of before; with adapters one more in the state, and their factors."""
    model = merged(base, None)
    shape = StateShape(2, 128)
    plain, with_mask = model.engine.abstract_state(shape), served.engine.abstract_state(shape)
    assert plain.rank_mask is None
    assert len(jax.tree.leaves(with_mask)) == len(jax.tree.leaves(plain)) + 1
    assert with_mask.rank_mask.shape == (2, 3 + 2)
    assert jax.tree.structure(served._params) == jax.tree.structure(model._params)


def test_refusals(base, directories, served, tmp_path):
    with pytest.raises(UserError, match="unknown adapter 'nobody'; choose one of mine, theirs"):
        served.generate(["3 plus 4?"], adapter="nobody")
    with pytest.raises(UserError, match="2 prompts but 1 adapters"):
        served.generate(["3?", "4?"], adapter=["mine"])
    with pytest.raises(UserError, match="unknown adapter 'mine'; none is loaded"):
        merged(base, None).generate(["3 plus 4?"], adapter="mine")
    with pytest.raises(UserError, match="adapters do not go with offload"):
        sphinx_jax.load(base, adapters=directories, offload=True)
    with pytest.raises(UserError, match="does not fit the model"):
        sphinx_jax.load(sphinx_jax.SHIPPED, adapters={"theirs": directories["theirs"]})
    with pytest.raises(UserError, match="holds no adapters"):
        sphinx_jax.load(base, adapters={"theirs": tmp_path})
