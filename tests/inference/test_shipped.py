"""The shipped model understands questions as people type them, and phrasings that it was never trained on."""

import numpy as np
import pytest

import sharding
import sphinx_jax
from sphinx_jax.data import easy_vqa
from sphinx_jax.data.easy_vqa_phrasings import HELD_BACK
from tests.instruments.easy_vqa_variants import VARIANTS, phrasing_accuracies, variant_accuracies


@pytest.fixture(scope="module")
def nano():
    return sphinx_jax.load(sphinx_jax.SHIPPED, sharding.make_mesh(), "float32", max_model_len=256)


def test_the_example_question_of_the_readme_is_answered(nano):
    records = easy_vqa.load("test").select(range(16))
    colours = [easy_vqa.known_attributes(questions).colour for questions in records.questions]
    answers = nano.generate(["What color is the shape?"] * 16, list(records.images), max_new_tokens=8)
    assert np.mean([answer == colour for answer, colour in zip(answers, colours, strict=True) if colour]) > 0.9


def test_a_later_turn_is_understood(nano):
    records = easy_vqa.load("test")
    for image, questions in list(zip(records.images, records.questions, strict=True))[:4]:
        known = easy_vqa.known_attributes(questions)
        chat = nano.chat(image, max_new_tokens=8)
        assert known.shape in (None, chat.ask("what shape is in the image?"))
        assert chat.ask("Is it red?") == ("yes" if known.colour == "red" else "no")


@pytest.mark.slow
def test_case_punctuation_spaces_and_image_marks_do_not_matter(nano):
    accuracies = variant_accuracies(nano, 300)
    assert accuracies["original"] >= 0.99
    assert min(accuracies.values()) >= 0.97, accuracies
    assert len(accuracies) == len(VARIANTS)


@pytest.mark.slow
def test_phrasings_held_back_from_training_are_understood(nano):
    accuracies = phrasing_accuracies(nano, HELD_BACK, images_per_phrasing=10)
    assert np.mean(list(accuracies.values())) >= 0.9, accuracies
    later = [accuracy for phrasing, accuracy in accuracies.items() if phrasing.startswith("(later)")]
    assert np.mean(later) >= 0.9 and np.mean([accuracy < 0.5 for accuracy in accuracies.values()]) <= 0.05
