"""The data set: its splits and scores, what its questions tell, and the sequences made of them."""

import collections
import importlib.util
import json
import types

import numpy as np
import pytest

from sphinx_jax.data import easy_vqa
from sphinx_jax.data.easy_vqa import Question
from sphinx_jax.errors import UserError
from sphinx_jax.language.kv_cache import segment_mask, segment_positions


def test_splits(train, held_out):
    assert (len(train), len(held_out)) == (4000, 1000)
    assert sum(map(len, train.questions)) == 38_575 and sum(map(len, held_out.questions)) == 9_673
    assert train.images.shape == (4000, 64, 64, 3) and train.images.dtype == np.uint8
    validation_split, validation = easy_vqa.load("tuning"), easy_vqa.load("validation")
    assert (len(validation_split), len(validation)) == (3600, 400)
    assert sorted(validation_split.ids + validation.ids) == list(train.ids)
    for record in (validation[0], validation[-1], validation_split[17]):
        original = train[train.ids.index(record.id)]
        assert original.questions == record.questions
        np.testing.assert_array_equal(original.image, record.image)


def test_records_are_like_a_list(train):
    first = train[:3]
    assert len(first) == 3 and [record.id for record in first] == [0, 1, 2]
    assert first[0].questions[:2] == (("what is the blue shape?", "rectangle"), ("what color is the shape?", "blue"))


def test_blind_baseline_is_the_published_one(train, held_out):
    scores = easy_vqa.blind_baseline(train, held_out)
    assert {name: round(100 * value, 1) for name, value in scores.items()} == {
        "overall": 67.0,
        "yes_no": 82.5,
        "open": 23.3,
    }


def test_score_counts_by_kind():
    questions = [Question("a", "yes"), Question("b", "no"), Question("c", "red"), Question("d", "circle")]
    assert easy_vqa.score(questions, [" Yes\n", "yes", "red", "square"]) == {"overall": 0.5, "yes_no": 0.5, "open": 0.5}
    assert easy_vqa.score(questions[:1], ["yes"])["overall"] == 1
    assert np.isnan(easy_vqa.score(questions[:1], ["yes"])["open"])
    with pytest.raises(ValueError, match="argument"):
        easy_vqa.score(questions, ["yes"])


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([("what is the blue shape?", "circle")], ("circle", "blue")),
        ([("what color is the triangle?", "red")], ("triangle", "red")),
        ([("what shape is present?", "circle")], ("circle", None)),
        ([("is there a teal shape?", "yes")], (None, "teal")),
        ([("is there not a teal shape?", "no")], (None, "teal")),
        ([("is no circle present?", "yes"), ("is there a rectangle?", "no")], ("triangle", None)),
        ([("does the image not contain a circle?", "yes")], (None, None)),
        ([], (None, None)),
    ],
)
def test_attributes_by_hand(questions, expected):
    assert easy_vqa.attributes([Question(*question) for question in questions]) == expected


TONES = {
    **{"black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128)},
    **{"green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0)},
}


def test_attributes_are_what_the_pictures_show(train):
    """The pictures, which `attributes` never sees: the tone of what is drawn, and how full its bounding box is."""
    known = [easy_vqa.attributes(questions) for questions in train.questions]
    assert sum(a.shape is not None for a in known) > 3800 and sum(a.colour is not None for a in known) > 3700
    drawn = (np.abs(train.images.astype(int) - train.images[:, :1, :1]) > 12).any(-1)
    right, fills = [], collections.defaultdict(list)
    for picture, mask, attributes in zip(train.images, drawn, known, strict=True):
        if attributes.colour is not None:
            tone = np.median(picture[mask], axis=0)
            right.append(min(TONES, key=lambda name: np.abs(tone - TONES[name]).max()) == attributes.colour)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        cut_by_the_edge = min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == 63
        if attributes.shape is not None and not cut_by_the_edge:
            fills[attributes.shape].append(mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))
    # The rest are slivers that blend with their background.
    assert np.mean(right) > 0.995
    assert np.mean(np.array(fills["rectangle"]) > 0.9) > 0.99
    assert np.mean((np.array(fills["circle"]) > 0.7) & (np.array(fills["circle"]) < 0.9)) > 0.99
    assert np.mean(np.array(fills["triangle"]) < 0.7) > 0.97


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.\n\n"
)


@pytest.fixture(scope="module")
def table(train, small):
    return easy_vqa.TurnTable.build(train, small)


def test_a_turn_has_the_tokens_it_has_alone(train, small, table):
    distinct = sorted({question for _, question in train.pairs()})
    assert len(distinct) == len(table.tokens) > 250
    for question, tokens, labels in zip(distinct, table.tokens, table.labels, strict=True):
        asked = f"{SYSTEM}### Human: {question.text}\n### Assistant:"
        prompt = small.encode(asked, bos=True, eos=False)
        whole = small.encode(f"{asked} {question.answer}\n###", bos=True, eos=False)
        assert [*table.beginning, *tokens] == whole
        has_loss = whole[len(prompt) :]
        assert labels.tolist() == [0] * (len(tokens) - len(has_loss)) + has_loss


def test_turns_of_one_sequence_train_as_if_asked_alone(small, table):
    chosen = [3, 200, 3, 77]
    length = len(table.beginning) + sum(len(table.tokens[turn]) for turn in chosen) + 5
    tokens, labels, turns = easy_vqa.sequence(table, chosen, length, padding_turn=9)
    seen, positions = np.array(segment_mask(turns[None]))[0], np.array(segment_positions(turns[None]))[0]
    for number, turn in enumerate(chosen, start=1):
        alone = [*table.beginning, *table.tokens[turn]]
        last = np.flatnonzero(turns == number)[-1]
        assert tokens[seen[last]].tolist() == alone
        assert positions[seen[last]].tolist() == list(range(len(alone)))
        # A label's predecessor, which predicts it, is in the same turn.
        assert (turns[np.flatnonzero(labels) - 1] == turns[np.flatnonzero(labels)]).all()
        assert labels[turns == number].tolist() == table.labels[turn].tolist()
    padding = turns == 9
    assert padding.sum() == 5 and not labels[padding].any() and not labels[turns == 0].any()
    assert not seen[np.ix_(~padding, padding)].any()


def test_turns_that_do_not_fit_are_left_out(table):
    length = len(table.beginning) + len(table.tokens[0]) + len(table.tokens[1]) - 1
    _, labels, turns = easy_vqa.sequence(table, [0, 1], length, padding_turn=3)
    assert set(turns.tolist()) == {0, 1, 3} and (labels[turns == 3] == 0).all()


@pytest.fixture(scope="module")
def make(train, small):
    some = train.select(range(0, 4000, 40))
    return lambda seed: easy_vqa.train_batches(some, small, 16, seed, max_length=120, turns_per_picture=4)


def test_batches(make, train, small):
    batches = make(0)
    pictures = {}
    for record in train[::40]:
        for mirrored in (record.image, record.image[:, ::-1]):
            # The middle of the picture moved by up to 4 pixels is somewhere inside the original.
            pictures[mirrored.tobytes()] = record
    for _ in range(3):
        batch = next(batches)
        assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
            "images": ("uint8", (16, 64, 64, 3)),
            **dict.fromkeys(("tokens", "labels", "segment_ids"), ("int32", (16, 120))),
            **dict.fromkeys(("shape", "colour"), ("int32", (16,))),
            "examples": ("int64", (16,)),
        }
        has_loss = batch["labels"] != 0
        assert (batch["labels"][has_loss] == batch["tokens"][has_loss]).all()
        assert set(np.unique(batch["segment_ids"])) <= {0, 1, 2, 3, 4, 5}
        for tokens, turns, shape, colour in zip(
            *(batch[k] for k in ("tokens", "segment_ids", "shape", "colour")), strict=True
        ):
            texts = [small.decode(tokens[turns == turn].tolist()) for turn in range(1, turns.max() + 1) if turn < 5]
            told = [Question(*_read(text)) for text in texts if text]
            assert len(set(told)) == len(told)
            # The label agrees with every question shown, and covers at least what these tell.
            shown = easy_vqa.attributes(told)
            assert shown.shape in (None, easy_vqa.SHAPES[shape]) and shown.colour in (None, easy_vqa.COLOURS[colour])


def _read(turn: str) -> tuple[str, str]:
    question, answer = turn.removesuffix("\n###").split("\n### Assistant:")
    return question.removeprefix("Human:").strip(), answer.strip()


def test_batches_are_the_same_for_the_same_seed_and_resume(make):
    batches, again, other = make(5), make(5), make(6)
    first = [next(batches) for _ in range(8)]
    _equal(first[0], next(again))
    assert not np.array_equal(first[0]["tokens"], next(other)["tokens"])
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(8)]
    again.set_state(state)
    for batch in expected:
        _equal(batch, next(again))


def _equal(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key])


def test_no_room_for_a_question_is_said(train, small):
    with pytest.raises(UserError, match="maximum length 40"):
        easy_vqa.train_batches(train[:3], small, 2, 0, max_length=40, turns_per_picture=2)


def test_augmentation_only_mirrors_and_moves():
    random = np.random.default_rng(0)
    picture = np.full((20, 24, 3), (200, 210, 220), np.uint8)
    picture[8:11, 9:15] = random.integers(0, 100, (3, 6, 3))
    mirrored = collections.Counter()
    moves = set()
    for _ in range(40):
        for out in easy_vqa.augment(np.stack([picture] * 8), random):
            top, left = (np.flatnonzero((out < 150).all(-1).any(axis)).min() for axis in (1, 0))
            block = out[top : top + 3, left : left + 6]
            assert (out == picture[0, 0]).all(-1).sum() == 20 * 24 - 18
            straight = np.array_equal(block, picture[8:11, 9:15])
            assert straight or np.array_equal(block, picture[8:11, 14:8:-1])
            mirrored[straight] += 1
            moves.add((int(top) - 8, int(left) - 9))
    assert 120 < mirrored[True] < 200
    assert {abs(step) for move in moves for step in move} == {0, 1, 2, 3, 4}


def test_background_is_found_when_a_shape_covers_a_corner():
    for shade in (0, 255):
        picture = np.full((1, 20, 20, 3), 128, np.uint8)
        picture[0, :6, :6] = shade
        for _ in range(10):
            out = easy_vqa.augment(picture, np.random.default_rng(0))
            assert set(np.unique(out)) <= {shade, 128} and (out == shade).all(-1).sum() <= 36


def test_not_installed_is_said(monkeypatch):
    easy_vqa._read.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sphinx-jax\[demo\]'"):
        easy_vqa.load("train")


@pytest.mark.parametrize("content", ["{}", '[["a", "b"]]', "[[", '[["a", "b", 0]]', '["abc"]', '[["a", 1, 0]]', None])
def test_a_damaged_installation_is_said(monkeypatch, tmp_path, content):
    easy_vqa._read.cache_clear()
    (tmp_path / "data" / "test").mkdir(parents=True)
    if content is not None:
        (tmp_path / "data" / "test" / "questions.json").write_text(content)
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match=str(tmp_path)):
        easy_vqa.load("test")
