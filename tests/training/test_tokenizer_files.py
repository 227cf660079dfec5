"""Training from a fine-tune keeps its whole tokenizer: added tokens, ends of sequence, tokenizer.json."""

import json
from pathlib import Path

import pytest
import tokenizers

import sharding
import sphinx_jax
from sphinx_jax import checkpoints
from sphinx_jax.cli import common, convert, train
from sphinx_jax.config import DecoderConfig, SphinxConfig
from sphinx_jax.data.conversation import Conversation
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.data.tasks import YamlData, YamlOptions
from sphinx_jax.data.tokenizer import train_tokenizer
from sphinx_jax.model import SphinxMoE
from tests.training.test_killed import write_data

PIECES, VOCAB, END = 300, 302, 301
LANGUAGE = DecoderConfig(
    dim=32, hidden_dim=48, num_layers=1, num_heads=4, num_kv_heads=4, num_experts=4, vocab_size=VOCAB
)
TEXTS = [Conversation.from_pairs([(f"{i} plus {i % 7}?", "9")]).text() for i in range(99)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Hugging Face directory of a ChatML fine-tune."""
    path = tmp_path_factory.mktemp("base") / "chatml"
    config = SphinxConfig(LANGUAGE, vision=None)
    params = sharding.init_params(lambda rngs: SphinxMoE(config, rngs=rngs), 0, sharding.make_mesh())[1]
    checkpoints.save(path, config, params, train_tokenizer(TEXTS, PIECES), "mixtral")
    values = json.loads((path / "config.json").read_text())
    del values["tokenizer_vocab_size"]
    (path / "config.json").write_text(json.dumps(values))
    (path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": PIECES, "<|im_end|>": END}))
    described = {"chat_template": "{{ messages[0].content }}<|im_end|>", "additional_special_tokens": ["<|im_end|>"]}
    (path / "tokenizer_config.json").write_text(json.dumps(described))
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return path


def run_train(base: Path, out: Path, data: Path, *more: str) -> int:
    argv = ["--init", base, "--data", data, "--out", out, "--max-length", 200, "--batch-size", 4, "--steps", 2]
    return common.run(train.main, [*map(str, argv), "--save-every", "1", *more])


def check_tokenizer(path: Path) -> None:
    model = sphinx_jax.load(path)
    assert (model.tokenizer.vocab_size, model.tokenizer.eos_ids) == (VOCAB, (2, END))
    assert model.tokenizer.encode("<|im_end|>", bos=False, eos=False) == [END]
    assert model.tokenizer.decode([END]) == ""
    # It was trained with our template, and is asked with it.
    asked = Conversation.from_pairs([("1 plus 1?", None)]).prompt()
    assert list(model.request("1 plus 1?").tokens) == model.tokenizer.encode(asked, bos=True, eos=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["all", "lora"])
def test_added_tokens_and_ends_of_sequence(base, tmp_path, stage):
    out = tmp_path / "run"
    assert run_train(base, out, write_data(tmp_path), "--stage", stage) == 0
    check_tokenizer(out)
    for format in ("native", "mixtral"):
        converted = tmp_path / format
        assert common.run(convert.main, [str(out), str(converted), "--step", "1", "--format", format]) == 0
        check_tokenizer(converted)
    # Resumed, and trained from again.
    assert run_train(base, out, tmp_path / "data.yaml", "--stage", stage, "--steps", "3", "--resume") == 0
    assert run_train(out, tmp_path / "second", tmp_path / "data.yaml") == 0
    check_tokenizer(tmp_path / "second")


def test_added_tokens_are_learned_as_tokens(base, tmp_path):
    data = write_data(tmp_path)
    records = json.loads((tmp_path / "records.json").read_text())
    for record in records:
        record["conversations"][1]["value"] += "<|im_end|>"
    (tmp_path / "records.json").write_text(json.dumps(records))
    files = train.starting_tokenizer(checkpoints.open(base))
    task = YamlData(data, SphinxConfig(LANGUAGE, vision=None), files, SkippedRecords(0.0), YamlOptions(max_length=200))
    labels = next(task.batches(4, seed=0))["labels"]
    assert (labels == END).sum(axis=1).tolist() == [1] * 4


def test_tokenizer_json_alone(base, tmp_path):
    """No other tokenizer is trained in its place."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    other = tmp_path / "base"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).symlink_to(base / name)
    (other / "tokenizer.json").write_text(tokenizer.to_str())
    assert run_train(other, tmp_path / "run", write_data(tmp_path)) == 0
    assert not (tmp_path / "run" / "tokenizer.model").exists()
    trained = sphinx_jax.load(tmp_path / "run").tokenizer
    assert trained.encode(TEXTS[0], bos=False, eos=False) == tokenizer.encode(TEXTS[0]).ids


def test_no_tokenizer_at_all(base, tmp_path, capsys):
    other = tmp_path / "base"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).symlink_to(base / name)
    assert run_train(other, tmp_path / "run", write_data(tmp_path)) == 2
    assert "has no tokenizer" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
