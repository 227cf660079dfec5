"""Packing: bins, and that the loss of packed conversations is that of each alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

from sphinx_jax import config
from sphinx_jax.data import accessory_yaml
from sphinx_jax.data.batching import ItemReader, packed_sequences, train_batches
from sphinx_jax.data.packing import join, pack
from sphinx_jax.data.skipped_records import SkippedRecords
from sphinx_jax.errors import UserError
from sphinx_jax.model import SphinxMoE
from sphinx_jax.training.step import next_token_losses

LENGTH = 160


@pytest.mark.parametrize("seed", range(5))
def test_pack_fits_everything_once_and_tightly(seed):
    lengths = np.random.default_rng(seed).integers(1, 100, 300).tolist()
    bins = pack(lengths, 128)
    assert sorted(index for chosen in bins for index in chosen) == list(range(300))
    filled = [sum(lengths[index] for index in chosen) for chosen in bins]
    assert max(filled) <= 128
    # Best fit decreasing uses at most 11/9 of the fewest bins possible, and 1 (Johnson 1974).
    fewest = max(np.ceil(sum(lengths) / 128), sum(length > 64 for length in lengths))
    assert len(bins) <= 11 / 9 * fewest + 1


def test_a_length_above_the_capacity_has_a_bin_of_its_own():
    assert sorted(pack([300, 2, 126], 128)) == [(0,), (2, 1)]


@pytest.fixture
def texts(tmp_path, small):
    """Thirty conversations of different lengths: their annotations and reader."""
    random = np.random.default_rng(0)
    words = ["circle", "blue", "is", "there", "a", "green", "shape"]
    records = []
    for i in range(30):
        question, answer = (" ".join(random.choice(words, n)) for n in (1 + i % 5, 1 + i % 3))
        turns = [("human", question), ("gpt", answer)] * (1 + i % 2)
        records.append({"conversations": [{"from": role, "value": text} for role, text in turns]})
    (tmp_path / "records.json").write_text(json.dumps(records))
    meta = [{"type": "text", "path": str(tmp_path / "records.json")}]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"META": meta}))
    skipped = SkippedRecords(0.0)
    annotations = accessory_yaml.read(tmp_path / "data.yaml", skipped)
    return annotations, ItemReader(small, LENGTH, image_size=0, num_image_tokens=0, skipped=skipped)


@pytest.mark.slow
def test_losses_are_those_of_the_conversations_alone(texts):
    annotations, reader = texts
    sequences = packed_sequences(annotations, reader)
    assert len(sequences.items) < 20
    batches = train_batches(annotations, reader, sequences, batch_size=len(sequences.items), seed=0)
    packed = jax.tree.map(jnp.asarray, next(batches))
    assert sorted(packed["examples"].tolist()) == list(range(30))
    decoder = config.DecoderConfig(
        dim=32, hidden_dim=32, num_layers=1, num_heads=4, num_kv_heads=2, num_experts=4, vocab_size=512
    )
    model = SphinxMoE(config.SphinxConfig(language=decoder, vision=None), rngs=nnx.Rngs(0))
    losses, _, counted = next_token_losses(
        model(packed["tokens"], segment_ids=packed["segment_ids"])[0], packed["labels"]
    )
    # Sequence by sequence and token by token, in the order of the conversations in the batch.
    of_packed = np.asarray(losses)[np.asarray(counted)]

    alone = [reader.text(annotations.items[i]) for i in packed["examples"]]
    logits = model(jnp.stack([example.tokens for example in alone]))[0]
    expected = []
    for own_logits, example in zip(logits, alone, strict=True):
        each = optax.softmax_cross_entropy_with_integer_labels(own_logits[:-1], example.labels[1:])
        expected.append(np.asarray(each)[example.labels[1:] != 0])
    np.testing.assert_allclose(of_packed, np.concatenate(expected), rtol=2e-5)
    # The model attends to more than the last token: other conversations would change the losses.
    blended, _, _ = next_token_losses(model(packed["tokens"])[0], packed["labels"])
    assert np.abs(np.asarray(blended)[np.asarray(counted)] - of_packed).max() > 0.01


def test_a_conversation_too_long_is_truncated(texts):
    annotations, reader = texts
    long = annotations.items[-1].conversation.example(reader.tokenizer)
    sequence = join([long], 50)
    assert (
        sequence.tokens.tolist() == long.tokens[:50].tolist() and sequence.labels.tolist() == long.labels[:50].tolist()
    )
    short = join([long, long], 400)
    both = 2 * len(long.tokens)
    assert short.segment_ids[[0, both // 2 - 1, both // 2, both - 1, both, 399]].tolist() == [1, 1, 2, 2, 3, 3]
    assert not short.tokens[both:].any() and not short.labels[both:].any()


def test_images_alone_cannot_be_packed(texts, tmp_path):
    (tmp_path / "records.json").write_text(
        json.dumps([{"image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}])
    )
    annotations = accessory_yaml.read(tmp_path / "data.yaml", SkippedRecords(0.0))
    with pytest.raises(UserError, match="--pack: every conversation has an image"):
        packed_sequences(annotations, texts[1])
