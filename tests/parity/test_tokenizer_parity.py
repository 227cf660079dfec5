"""Tokenizers against transformers' own: added tokens, tokenizer.json, chat templates, and what an export keeps."""

import json

import pytest

import sharding
from sphinx_jax import checkpoints
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.data.tokenizer_files import load_tokenizer
from sphinx_jax.model import SphinxMoE
from tests.conftest import GOLDEN

transformers = pytest.importorskip("transformers", reason="the reference: install the parity extra")

PIECES, VOCAB = 32000, 32002
ADDED = {"<|im_end|>": 32000, "<|im_start|>": 32001}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "What is in the image?",
    "  two  spaces, ünïcödé 猫 🐱\n\nnew lines\ttabs ",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "text before <|im_end|> and after",
    "",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face directory of a ChatML fine-tune, with a random model of one layer."""
    path = tmp_path_factory.mktemp("chatml") / "model"
    config = SphinxConfig(
        DecoderConfig(
            dim=32, hidden_dim=48, num_layers=1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=VOCAB
        ),
        vision=None,
    )
    params = sharding.init_params(lambda rngs: SphinxMoE(config, rngs=rngs), 0, sharding.make_mesh())[1]
    checkpoints.save(path, config, params, (GOLDEN / "tokenizer" / "tokenizer.model").read_bytes(), "mixtral")
    values = json.loads((path / "config.json").read_text())
    del values["tokenizer_vocab_size"]
    more = {"max_position_embeddings": 4096, "eos_token_id": 32000, "pad_token_id": 2, "initializer_range": 0.03}
    (path / "config.json").write_text(json.dumps(values | more))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 32000], "bos_token_id": 1}))
    (path / "added_tokens.json").write_text(json.dumps(ADDED))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "legacy": True,
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {str(i): {"content": content} | flags for content, i in ADDED.items()},
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def our_tokenizer(path):
    source = checkpoints.open(path)
    return load_tokenizer(source.assets, VOCAB, str(path), text_only=True, expected_tokens=source.expected_tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_a_fine_tune(directory, text):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), our_tokenizer(directory)
    assert ours.encode(text, bos=True, eos=False) == theirs(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_tokenizer_json_alone(directory, text, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    theirs.save_pretrained(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    ours = load_tokenizer(files, VOCAB, str(tmp_path), expected_tokens=VOCAB)
    ids = theirs(text)["input_ids"]
    assert ours.encode(text, bos=True, eos=False) == ids
    assert ours.decode(ids) == our_tokenizer(directory).decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 32000, VOCAB)


def test_chat_template(directory):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), our_tokenizer(directory)
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.chat_template.render(messages) == text
    assert ours.chat_tokens(messages) == theirs(text)["input_ids"]


@pytest.mark.parametrize("through", ["mixtral", "native", "accessory"])
def test_export_keeps_what_the_source_had(directory, tmp_path, through):
    source = directory
    if through != "mixtral":
        checkpoints.convert(directory, tmp_path / through, through)
        source = tmp_path / through
    checkpoints.convert(source, tmp_path / "out", "mixtral")
    before, after = (transformers.AutoConfig.from_pretrained(path) for path in (directory, tmp_path / "out"))
    for name in ("max_position_embeddings", "eos_token_id", "pad_token_id", "initializer_range", "rope_parameters"):
        assert getattr(after, name) == getattr(before, name), name
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [2, 32000]
    theirs = [transformers.AutoTokenizer.from_pretrained(path) for path in (directory, tmp_path / "out")]
    for text in TEXTS:
        assert theirs[0](text)["input_ids"] == theirs[1](text)["input_ids"]
    assert theirs[1].chat_template == CHATML


def test_export_of_a_model_of_ours_begins_texts_with_bos(tmp_path):
    config = SphinxConfig(DecoderConfig(dim=32, hidden_dim=48, num_layers=1, num_heads=4, num_kv_heads=4), vision=None)
    params = sharding.init_params(lambda rngs: SphinxMoE(config, rngs=rngs), 0, sharding.make_mesh())[1]
    data = (GOLDEN / "tokenizer" / "tokenizer.model").read_bytes()
    checkpoints.save(tmp_path / "out", config, params, data, "mixtral")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer({"tokenizer.model": data}, 32000, "here")
    for text in TEXTS[:2]:
        assert theirs(text)["input_ids"] == ours.encode(text, bos=True, eos=False)
    assert theirs.eos_token_id == 2
