"""Vocabularies that no mesh divides: padded in memory, no token in loss, sampling or logits, not in files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax import checkpoints
from sphinx_jax.checkpoints.io import safetensors_files, torch_files
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.data.tokenizer import Tokenizer, train_tokenizer
from sphinx_jax.model import SphinxMoE, bind
from sphinx_jax.training.step import next_token_losses

VOCAB = 307
CONFIG = SphinxConfig(
    DecoderConfig(
        dim=32,
        hidden_dim=48,
        num_layers=2,
        num_heads=8,
        num_kv_heads=8,
        num_experts=4,
        vocab_size=VOCAB,
        rope_theta=1e4,
    ),
    vision=None,
)


@pytest.fixture(scope="module")
def tokenizer_bytes():
    data = train_tokenizer(["a cat sat on a mat and saw a rat", "what shape is in the image?"] * 4, VOCAB - 2)
    assert Tokenizer(data).vocab_size == VOCAB - 2
    return data


@pytest.fixture(scope="module")
def params():
    def make(rngs):
        return SphinxMoE(CONFIG, rngs=rngs)

    return sharding.init_params(make, 0, sharding.make_mesh(tensor=8))[1]


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(32000, 32000), (32001, 32256), (32002, 32256), (96, 96), (97, 104), (512, 512)]
)
def test_padded_size(vocab_size, padded):
    assert DecoderConfig(vocab_size=vocab_size).padded_vocab_size == padded


def test_arrays_are_padded_and_config_is_not(params):
    assert params["language"]["embedding"]["table"].shape == (312, 32)
    assert params["language"]["head"]["kernel"].shape == (32, 312)
    assert CONFIG.language.vocab_size == VOCAB


@pytest.mark.parametrize("format", ["native", "accessory", "mixtral"])
def test_files_hold_no_padding_and_load_on_any_mesh(params, tokenizer_bytes, tmp_path, format):
    path = tmp_path / format
    checkpoints.save(path, CONFIG, params, tokenizer_bytes, format)
    if format == "mixtral":
        tensors = safetensors_files.read(path / "model.safetensors").tensors
        shapes = [tensors[name].shape for name in ("model.embed_tokens.weight", "lm_head.weight")]
    elif format == "accessory":
        tensors = torch_files.read(path / "consolidated.00-of-01.model.pth").tensors
        shapes = [tensors[name].shape for name in ("llma.tok_embeddings.weight", "llma.output.weight")]
    else:
        assert json.loads((path / "config.json").read_text())["model"]["language"]["vocab_size"] == VOCAB
        stored = checkpoints.open(path).shards[0]
        shapes = [stored["language.embedding.table"].shape, stored["language.head.kernel"].shape[::-1]]
    assert shapes == [(VOCAB, 32)] * 2
    for mesh in ({}, {"tensor": 8}, {"fsdp": 8}, {"tensor": 2, "expert": 2, "fsdp": 2}):
        loaded = checkpoints.load(path, sharding.make_mesh(**mesh), unstacked=False)
        assert loaded.config.language == CONFIG.language
        table = np.asarray(loaded.params["language"]["embedding"]["table"])
        np.testing.assert_array_equal(table[:VOCAB], np.asarray(params["language"]["embedding"]["table"])[:VOCAB])
        assert not table[VOCAB:].any()
        assert not np.asarray(loaded.params["language"]["head"]["kernel"])[:, VOCAB:].any()


def test_loss_is_that_of_the_vocabulary_alone(params):
    graph = sharding.abstract_params(lambda rngs: SphinxMoE(CONFIG, rngs=rngs), sharding.make_mesh())[0]
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, VOCAB, (2, 16)))
    params = jax.device_put(params, jax.devices()[0])

    def losses(params, width):
        return next_token_losses(bind(graph, params)(tokens)[0][..., :width], tokens)[0]

    padded, unpadded = losses(params, 312), losses(params, VOCAB)
    np.testing.assert_allclose(padded, unpadded, rtol=1e-6)
    gradient = jax.grad(lambda p: losses(p, 312).sum())(params)["language"]
    assert np.isfinite(gradient["head"]["kernel"]).all()
    assert not np.asarray(gradient["head"]["kernel"])[:, VOCAB:].any()
    assert not np.asarray(gradient["embedding"]["table"])[VOCAB:].any()


@pytest.mark.slow
def test_generation_on_all_devices_equals_one(params, tokenizer_bytes, tmp_path):
    checkpoints.save(tmp_path / "model", CONFIG, params, tokenizer_bytes)
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, 9))
    options = {"max_new_tokens": 8, "raw": True, "temperature": 3.0, "top_p": 1.0, "repetition_penalty": 1.2}
    answers, logits = [], []
    # None: the default mesh of eight devices.
    for mesh in (None, sharding.make_mesh()):
        model = sphinx_jax.load(tmp_path / "model", mesh)
        logits.append(np.asarray(model.logits(tokens)))
        assert logits[-1].shape == (2, 9, VOCAB)
        answers.append([c.tokens for c in model.complete(["a cat", "what shape"], **options)])
    np.testing.assert_allclose(*logits, atol=1e-4)
    assert answers[0] == answers[1]
    assert all(token < model.tokenizer.vocab_size for answer in answers[0] for token in answer)


def test_resaved_model_has_no_padding(params, tokenizer_bytes, tmp_path):
    checkpoints.save(tmp_path / "model", CONFIG, params, tokenizer_bytes)
    sphinx_jax.load(tmp_path / "model").save(tmp_path / "again", "mixtral")
    tensors = safetensors_files.read(tmp_path / "again" / "model.safetensors").tensors
    assert tensors["lm_head.weight"].shape == (VOCAB, 32)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_head(params, tokenizer_bytes, tmp_path, kind):
    """Integers and scales of the vocabulary alone are stored, whichever way the checkpoint is written."""
    checkpoints.save(tmp_path / "model", CONFIG, params, tokenizer_bytes)
    mesh = sharding.make_mesh(data=2, expert=4)
    model = sphinx_jax.load(tmp_path / "model", mesh, quantize=kind)
    head = model.engine.params["language"]["head"]["kernel"]
    original = np.asarray(params["language"]["head"]["kernel"])[:, :VOCAB]
    error = np.abs(np.asarray(head.astype(jnp.float32))[:, :VOCAB] - original).max(axis=0)
    # Half a step; a step is rounded to bfloat16.
    assert np.all(error <= np.abs(original).max(axis=0) / 127 * 0.5 * (1 + 2**-8))
    model.save(tmp_path / "saved")
    checkpoints.convert(tmp_path / "model", tmp_path / "converted", "native", quantize=kind)
    for path in (tmp_path / "saved", tmp_path / "converted"):
        stored = checkpoints.open(path).shards[0]
        assert stored["language.head.kernel.values"].shape == (32, VOCAB)
        assert stored["language.head.kernel.scales"].shape == (1, VOCAB)
        loaded = sphinx_jax.load(path, mesh).engine.params["language"]["head"]["kernel"]
        jax.tree.map(np.testing.assert_array_equal, loaded, head)
        assert not np.asarray(loaded.values)[:, VOCAB:].any()


def test_accessory_shards_must_divide_the_vocabulary(params, tokenizer_bytes, tmp_path):
    with pytest.raises(sphinx_jax.UserError, match="--shards 2 does not divide the vocabulary, 307"):
        checkpoints.save(tmp_path / "out", CONFIG, params, tokenizer_bytes, "accessory", 2)
