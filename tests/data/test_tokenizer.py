"""Token ids as the original gives them, and small tokenizers of the same kind."""

import random
from pathlib import Path

import pytest
import sentencepiece

from sphinx_jax.data.tokenizer import Tokenizer, train_tokenizer
from sphinx_jax.errors import UserError

MIXTRAL_TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer" / "tokenizer.model"


def test_special_ids(mixtral, golden):
    expected = golden("conversations.json")["tokenizer"]
    assert (mixtral.bos_id, mixtral.eos_id, mixtral.unk_id) == (expected["bos"], expected["eos"], expected["unk"])
    assert mixtral.vocab_size == expected["n_words"]


def test_segments_are_tokenised_as_in_the_original(mixtral, golden):
    for case in golden("conversations.json")["segments"]:
        assert mixtral.encode(case["s"], bos=False, eos=False) == case["encode"], case
        assert mixtral.encode_segment(case["s"]) == case["encode_segment"], case
        assert mixtral.encode_wo_prefix_space(case["s"]) == case["encode_wo_prefix_space"], case


def test_decode_as_in_the_original(mixtral, golden):
    for case in golden("conversations.json")["decode"]:
        assert mixtral.decode(case["ids"]) == case["text"], case


def test_bos_and_eos_are_at_the_ends(mixtral):
    plain = mixtral.encode("Hello", bos=False, eos=False)
    assert mixtral.encode("Hello", bos=True, eos=True) == [1, *plain, 2]


def test_ids_past_the_vocabulary_decode_as_unknown(mixtral):
    assert mixtral.decode([22557, 40_000]) == mixtral.decode([22557, 0])


def test_bytes_and_path_are_the_same_tokenizer(mixtral):
    assert Tokenizer(mixtral.model_bytes).encode("one two", bos=True, eos=False) == mixtral.encode(
        "one two", bos=True, eos=False
    )


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b"no model", lambda b: b[:1000], lambda b: b[:-300] + b"\xff" * 300]
)
def test_a_damaged_file_is_named(tmp_path, mixtral, damage):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(mixtral.model_bytes))
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        Tokenizer(path)


@pytest.mark.parametrize("name", ["missing.model", "."])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot read the tokenizer"):
        Tokenizer(tmp_path / name)


def test_half_a_surrogate_pair_is_refused(mixtral):
    with pytest.raises(UserError, match="not valid Unicode"):
        mixtral.encode("fine \ud83d", bos=True, eos=False)


def test_training_is_deterministic_and_of_llamas_kind(small, mixtral):
    texts = [f"the {a} is {b}\nno {a}" for a in ("cat", "dog", "kettle") for b in ("red", "blue", "old")]
    model = train_tokenizer(texts, 300)
    assert model == train_tokenizer(texts, 300)
    for tokenizer in (Tokenizer(model), small):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
        pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
        # A space only ever begins a piece, and a newline is a byte: segments rely on both.
        names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
        assert all("▁" not in name.lstrip("▁") for name in names)
        assert not any("\n" in name for name in names)
        assert tokenizer.encode("\n", bos=False, eos=False)[-1] == mixtral.encode("\n", bos=False, eos=False)[-1] == 13


def test_any_text_survives_a_small_tokenizer(small):
    random_ = random.Random(0)
    alphabet = "abc XYZ é 中 🐱 \n\t\x00▁#<s>0123456789"
    for _ in range(200):
        text = "".join(random_.choices(alphabet, k=random_.randrange(30)))
        ids = small.encode(text, bos=True, eos=True)
        assert 0 not in ids
        # The one character that SentencePiece cannot represent is its own sign for a space.
        assert small.decode(ids) == text.replace("▁", " ")


def test_a_vocabulary_too_small_for_its_bytes_is_refused():
    with pytest.raises(ValueError, match="100 pieces"):
        train_tokenizer(["some text"], 100)


def test_a_tokenizer_that_folds_case_ignores_capitals_alone(nano_tokenizer):
    for text in ("what color is the shape?", "a  b\nc", "\n###"):
        ids = nano_tokenizer.encode(text, bos=True, eos=False)
        assert nano_tokenizer.encode(text.upper(), bos=True, eos=False) == ids
        assert nano_tokenizer.encode(text.title(), bos=True, eos=False) == ids
        assert nano_tokenizer.decode(ids) == text
