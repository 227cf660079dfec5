"""The tokenizer next to the weights: added tokens, ends of sequence, tokenizer.json, chat templates, wrong ones."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

import sharding
import sphinx_jax
from sphinx_jax import UserError, checkpoints
from sphinx_jax.cli import common, convert
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.data.tokenizer import Tokenizer, train_tokenizer
from sphinx_jax.data.tokenizer_files import load_tokenizer
from sphinx_jax.model import SphinxMoE

PIECES, VOCAB = 300, 302
IM_END, IM_START = PIECES, PIECES + 1
ADDED = {"<|im_end|>": IM_END, "<|im_start|>": IM_START}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["a cat sat on a mat and saw a rat", "what shape is in the image?", "user assistant system"]


@pytest.fixture(scope="module")
def sentencepiece() -> bytes:
    return train_tokenizer(TEXTS * 4, PIECES)


@pytest.fixture(scope="module")
def byte_level() -> bytes:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer.to_str().encode()


@pytest.fixture
def files(sentencepiece):
    return {"tokenizer.model": sentencepiece, "added_tokens.json": json.dumps(ADDED).encode()}


@pytest.fixture
def directory(sentencepiece, tmp_path):
    """A Hugging Face directory of a model with two added tokens, and its tokenizer's files."""
    config = SphinxConfig(
        DecoderConfig(
            dim=32, hidden_dim=48, num_layers=1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=VOCAB
        ),
        vision=None,
    )
    params = sharding.init_params(lambda rngs: SphinxMoE(config, rngs=rngs), 0, sharding.make_mesh())[1]
    path = tmp_path / "chatml"
    checkpoints.save(path, config, params, sentencepiece, "mixtral")
    (path / "tokenizer_config.json").unlink()
    values = json.loads((path / "config.json").read_text())
    del values["tokenizer_vocab_size"]
    (path / "config.json").write_text(json.dumps(values))
    (path / "added_tokens.json").write_text(json.dumps(ADDED))
    return path


def edit(file, **values) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


def load(files, vocab_size=VOCAB, **options):
    return load_tokenizer(files, vocab_size, "DIR", expected_tokens=vocab_size, **options)


def test_added_tokens_are_tokens(files, sentencepiece):
    tokenizer, plain = load(files), Tokenizer(sentencepiece)
    assert tokenizer.vocab_size == VOCAB
    ids = tokenizer.encode("<|im_start|>user\na cat<|im_end|>", bos=True, eos=False)
    words = plain.encode("user\na cat", bos=False, eos=False)
    assert ids == [1, IM_START, *words, IM_END]
    # Without a note that they are special, they are text.
    assert tokenizer.decode(ids) == "<|im_start|> user\na cat<|im_end|>"
    assert tokenizer.token_bytes()[IM_END] == b"<|im_end|>"
    assert tokenizer.encode("a cat", bos=True, eos=True) == plain.encode("a cat", bos=True, eos=True)


@pytest.mark.parametrize(("legacy", "space"), [(True, " "), (False, "")])
def test_added_tokens_of_the_tokenizers_config(files, legacy, space):
    described = {str(i): {"content": content, "special": True, "rstrip": True} for content, i in ADDED.items()}
    config = {"added_tokens_decoder": described, "legacy": legacy, "eos_token": "<|im_end|>"}
    tokenizer = load(files | {"tokenizer_config.json": json.dumps(config).encode()})
    ids = tokenizer.encode("<|im_start|>   user<|im_end|>", bos=False, eos=False)
    assert ids[0] == IM_START and ids[-1] == IM_END
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode([*tokenizer.encode("a", bos=False, eos=False), *ids]) == f"a{space}user"


def test_added_token_with_the_id_of_a_piece(files):
    with pytest.raises(UserError, match="has the id 5 of another piece"):
        load(files | {"added_tokens.json": json.dumps(ADDED | {"<|im_end|>": 5}).encode()})
    # Those that repeat a piece are common.
    repeated = ADDED | {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert load(files | {"added_tokens.json": json.dumps(repeated).encode()}).vocab_size == VOCAB


@pytest.mark.parametrize("eos", [IM_END, [2, IM_END]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_of_sequence_of_the_configs_ends_generation(directory, eos, name):
    edit(directory / name, eos_token_id=eos)
    model = sphinx_jax.load(directory)
    assert model.tokenizer.eos_ids == (2, IM_END)
    make_certain(model, IM_END)
    (completion,) = model.complete(["a cat"], max_new_tokens=8)
    assert list(completion.tokens) == [IM_END]
    make_certain(model, IM_START)
    (completion,) = model.complete(["a cat"], max_new_tokens=8)
    assert list(completion.tokens) == [IM_START] * 8


def make_certain(model, token: int) -> None:
    """Every hidden state now predicts `token`."""

    def head(kernel):
        kernel = np.zeros(kernel.shape, np.float32)
        kernel[:, token] = 1
        return kernel

    language = model._params["language"]
    kernel = jax.device_put(head(language["head"]["kernel"]), language["head"]["kernel"].sharding)
    # The final norm's scale makes the sum over channels positive for one sign of the hidden state only: square it away.
    embedding = jax.tree.map(lambda x: jax.numpy.ones_like(x), language["embedding"])
    layers = jax.tree.map(lambda x: jax.numpy.zeros_like(x), language["layers"])
    model.set_params(
        {
            **model._params,
            "language": {**language, "head": {"kernel": kernel}, "embedding": embedding, "layers": layers},
        }
    )


@pytest.mark.parametrize(
    "value", ["2", [2, None], [True], -1, 10**9, 2.0, {"a": 1}], ids=lambda value: json.dumps(value)
)
def test_end_of_sequence_that_is_no_token(files, value):
    with pytest.raises(UserError, match=r"eos_token_id of generation_config\.json must be token ids below 302"):
        load(files | {"generation_config.json": json.dumps({"eos_token_id": value}).encode()})


def test_tokenizer_of_another_model_is_refused_before_weights_are_read(directory, monkeypatch):
    monkeypatch.setattr(checkpoints.reader.CheckpointReader, "read", lambda *_: pytest.fail("weights were read"))
    (directory / "added_tokens.json").unlink()
    with pytest.raises(UserError, match="has 300 tokens and the model 302: copy all of the model's own"):
        sphinx_jax.load(directory)
    (directory / "tokenizer.model").write_bytes(train_tokenizer(TEXTS * 4, VOCAB + 8))
    with pytest.raises(UserError, match="tokens and the model only 302"):
        sphinx_jax.load(directory)
    (directory / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        sphinx_jax.load(directory)
    (directory / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: no tokenizer\.model or tokenizer\.json"):
        sphinx_jax.load(directory)


def test_padded_vocabulary_of_a_published_model(sentencepiece):
    # 300 rounded up to 64 and 128; 302 is no rounding.
    for vocab_size in (300, 304, 320, 384, 512):
        load({"tokenizer.model": sentencepiece}, vocab_size)
    for vocab_size in (301, 302, 32000):
        with pytest.raises(UserError, match="copy all of the model's own"):
            load({"tokenizer.model": sentencepiece}, vocab_size)


def test_tokenizer_json_alone(byte_level, directory):
    for name in ("tokenizer.model", "added_tokens.json"):
        (directory / name).unlink()
    (directory / "tokenizer.json").write_bytes(byte_level)
    model = sphinx_jax.load(directory)
    tokenizer = model.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, VOCAB)
    assert tokenizer.eos_ids == (1, 2)
    for text in ("a cat sat", " two  spaces ", "ünïcödé 猫 🐱\n\ttab", ""):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert (ids[0], ids[-1]) == (0, 1)
        assert tokenizer.decode(ids) == text
        table = tokenizer.token_bytes()
        assert b"".join(table[i] for i in ids).decode() == text
    (answer,) = model.generate(["a cat"], max_new_tokens=4)
    assert isinstance(answer, str)
    model.save(directory.parent / "native")
    again = sphinx_jax.load(directory.parent / "native")
    assert again.generate(["a cat"], max_new_tokens=4) == [answer]
    assert again.tokenizer.eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not a tokenizer, or damaged"),
        (b"[" * 100_000, "is not a tokenizer, or damaged"),
        (b"\xff\xfe", "is not a tokenizer, or damaged"),
        (
            tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str().encode(),
            "cannot be joined to text",
        ),
    ],
    ids=["cut off", "nested", "no text", "words"],
)
def test_damaged_tokenizer_json(data, message):
    with pytest.raises(UserError, match=message):
        load({"tokenizer.json": data})


def test_tokenizer_model_v3(directory, sentencepiece):
    (directory / "tokenizer.model").rename(directory / "tokenizer.model.v3")
    assert sphinx_jax.load(directory).tokenizer.vocab_size == VOCAB


def test_chat_template_of_a_text_only_model(directory):
    edit(directory / "tokenizer_config.json", chat_template=CHATML, bos_token="<s>", eos_token="<|im_end|>")
    model = sphinx_jax.load(directory)
    text = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    assert list(model.request("a cat").tokens) == model.tokenizer.encode(text, bos=True, eos=False)
    assert model.request("a cat").stops == ()
    prefixed = model.request("a cat", prefix="a rat").tokens
    assert list(prefixed) == model.tokenizer.encode(text + "a rat", bos=True, eos=False)
    chat = model.chat(max_new_tokens=3)
    chat.ask("a cat")
    chat.ask("a rat")
    assert len(chat.turns) == 2


def test_template_that_writes_bos_gives_one(files):
    config = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": "<s>"}
    tokenizer = load(files | {"tokenizer_config.json": json.dumps(config).encode()}, text_only=True)
    tokens = tokenizer.chat_tokens([{"role": "user", "content": "a cat"}])
    assert tokens == tokenizer.encode("a cat", bos=True, eos=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "is not a chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__[-1].__subclasses__() }}", "cannot write this conversation"),
        ("{{ messages[9].content.x }}", "cannot write this conversation"),
        ("{% for i in range(10**9) %}x{% endfor %}", "cannot write this conversation"),
    ],
    ids=["syntax", "refuses", "hostile", "missing", "endless"],
)
def test_bad_chat_templates(files, template, message):
    config = json.dumps({"chat_template": template}).encode()
    with pytest.raises(UserError, match=message):
        load(files | {"tokenizer_config.json": config}, text_only=True).chat_tokens([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("format", ["native", "mixtral", "accessory"])
def test_conversion_keeps_the_tokenizer(directory, tmp_path, format):
    edit(directory / "generation_config.json", eos_token_id=[2, IM_END])
    out = tmp_path / "out"
    assert common.run(convert.main, [str(directory), str(out), "--format", format]) == 0
    model = sphinx_jax.load(out)
    assert model.tokenizer.eos_ids == (2, IM_END)
    assert model.tokenizer.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, not the file itself: log in"),
    ],
    ids=["lfs", "html"],
)
@pytest.mark.parametrize("format", ["native", "mixtral"])
def test_conversion_refuses_a_placeholder_as_tokenizer(directory, tmp_path, capsys, data, message, format):
    (directory / "tokenizer.model").write_bytes(data)
    assert common.run(convert.main, [str(directory), str(tmp_path / "out"), "--format", format]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message):
        sphinx_jax.load(directory)


def test_small_tokenizer_of_an_exported_run(sentencepiece, tmp_path):
    """A model of ours may have more token ids than its tokenizer; its exports load too."""
    config = SphinxConfig(
        DecoderConfig(dim=32, hidden_dim=48, num_layers=1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=330),
        vision=None,
    )
    params = sharding.init_params(lambda rngs: SphinxMoE(config, rngs=rngs), 0, sharding.make_mesh())[1]
    for format in checkpoints.FORMATS:
        checkpoints.save(tmp_path / format, config, params, sentencepiece, format)
        assert sphinx_jax.load(tmp_path / format).tokenizer.vocab_size == PIECES
    shutil.rmtree(tmp_path / "native")
