"""The data set: its splits, accuracies, and what its questions tell about an image."""

import collections
import importlib.util
import types

import numpy as np
import pytest

from sphinx_jax.data import easy_vqa
from sphinx_jax.data.easy_vqa import Question
from sphinx_jax.errors import UserError


def test_splits(train, held_out):
    assert (len(train), len(held_out)) == (4000, 1000)
    assert sum(map(len, train.questions)) == 38_575 and sum(map(len, held_out.questions)) == 9_673
    assert train.images.shape == (4000, 64, 64, 3) and train.images.dtype == np.uint8
    tuning, validation = easy_vqa.load("tuning"), easy_vqa.load("validation")
    assert (len(tuning), len(validation)) == (3600, 400)
    assert sorted(tuning.ids + validation.ids) == list(train.ids)
    for record in (validation[0], validation[-1], tuning[17]):
        original = train[train.ids.index(record.id)]
        assert original.questions == record.questions
        np.testing.assert_array_equal(original.image, record.image)


def test_records_are_a_sequence(train):
    first = train.select(range(3))
    assert len(first) == 3 and [record.id for record in first] == [0, 1, 2]
    assert first[0].questions[:2] == (("what is the blue shape?", "rectangle"), ("what color is the shape?", "blue"))


def test_accuracy_without_images_is_the_published_one(train, held_out):
    accuracies = easy_vqa.accuracy_without_images(train, held_out)
    assert {name: round(100 * value, 1) for name, value in accuracies.items()} == {
        "overall": 67.0,
        "yes_no": 82.5,
        "open": 23.3,
    }


def test_accuracy_by_kind():
    questions = [Question("a", "yes"), Question("b", "no"), Question("c", "red"), Question("d", "circle")]
    half = {"overall": 0.5, "yes_no": 0.5, "open": 0.5}
    assert easy_vqa.accuracy(questions, [" Yes\n", "yes", "red", "square"]) == half
    assert easy_vqa.accuracy(questions[:1], ["yes"])["overall"] == 1
    assert np.isnan(easy_vqa.accuracy(questions[:1], ["yes"])["open"])
    with pytest.raises(ValueError, match="argument"):
        easy_vqa.accuracy(questions, ["yes"])


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
def test_known_attributes_by_hand(questions, expected):
    assert easy_vqa.known_attributes([Question(*question) for question in questions]) == expected


TONES = {
    **{"black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128)},
    **{"green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0)},
}


def test_known_attributes_are_what_the_images_show(train):
    """Read off the images, which `known_attributes` does not use: colour of the drawing, and filled bounding box."""
    known = [easy_vqa.known_attributes(questions) for questions in train.questions]
    assert sum(a.shape is not None for a in known) > 3800 and sum(a.colour is not None for a in known) > 3700
    drawn = (np.abs(train.images.astype(int) - train.images[:, :1, :1]) > 12).any(-1)
    right, fills = [], collections.defaultdict(list)
    for image, mask, attributes in zip(train.images, drawn, known, strict=True):
        if attributes.colour is not None:
            tone = np.median(image[mask], axis=0)
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


def test_not_installed_is_reported(monkeypatch):
    easy_vqa._read.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sphinx-jax\[demo\]'"):
        easy_vqa.load("train")


@pytest.mark.parametrize("content", ["{}", '[["a", "b"]]', "[[", '[["a", "b", 0]]', '["abc"]', '[["a", 1, 0]]', None])
def test_a_damaged_installation_is_reported(monkeypatch, tmp_path, content):
    easy_vqa._read.cache_clear()
    (tmp_path / "data" / "test").mkdir(parents=True)
    if content is not None:
        (tmp_path / "data" / "test" / "questions.json").write_text(content)
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match=str(tmp_path)):
        easy_vqa.load("test")
