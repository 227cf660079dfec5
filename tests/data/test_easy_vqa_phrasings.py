"""Phrasings: well-formed, rightly answered, and the held-back set shares no question with the trained one."""

import re

import numpy as np
import pytest

from sphinx_jax.data.easy_vqa_phrasings import (
    COLOURS,
    HELD_BACK,
    INTENTS,
    SHAPES,
    SYNONYMS,
    TRAINED,
    KnownAttributes,
    fill,
    rephrase,
    trained_examples,
    vary_surface,
)

SETS = {"trained": TRAINED, "trained later": TRAINED.later, "held back": HELD_BACK, "held back later": HELD_BACK.later}


@pytest.mark.parametrize("name", SETS)
def test_phrasings_are_lower_case_without_a_question_mark_and_unique(name):
    templates = [template for templates in SETS[name].by_intent().values() for template in templates]
    assert len(set(templates)) == len(templates)
    for intent, own in SETS[name].by_intent().items():
        required = {"is_shape": {"shape"}, "is_colour": {"colour"}, "is_both": {"shape", "colour"}}.get(intent, set())
        for template in own:
            assert re.fullmatch(r"[a-z',]+( [a-z',]+)*", re.sub(r"\{(shape|colour)\}", "x", template)), template
            assert required <= set(re.findall(r"\{(\w+)\}", template)), template


def simplified(template: str) -> str:
    """Without punctuation, articles and polite words, and with the first of each set of synonyms."""
    text = re.sub(r"[^a-z'{} ]", "", template)
    for first, *others in SYNONYMS.values():
        for other in others:
            text = re.sub(rf"\b{other}\b", first, text)
    return " ".join(word for word in text.split() if word not in ("a", "the", "please", "and", "so", "then"))


def test_held_back_phrasings_are_not_trained():
    trained = {
        simplified(t) for name in ("trained", "trained later") for ts in SETS[name].by_intent().values() for t in ts
    }
    for name in ("held back", "held back later"):
        for templates in SETS[name].by_intent().values():
            assert not {simplified(template) for template in templates} & trained


def test_there_are_many_of_both():
    def count(phrasings):
        return sum(map(len, phrasings.by_intent().values()))

    assert count(TRAINED) > 250 and count(HELD_BACK) >= 40
    assert count(TRAINED.later) > 40 and count(HELD_BACK.later) >= 15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_answers_are_right(shape, colour):
    """The answer is worked out anew from the words of the question."""
    known, random = KnownAttributes(shape, colour), np.random.default_rng(0)
    answers = {"yes": 0, "no": 0}
    for phrasings in SETS.values():
        for intent, templates in phrasings.by_intent().items():
            for template in templates:
                text, answer = fill(template, intent, known, random)
                assert text.endswith("?") and "{" not in text
                words = set(re.findall(r"[a-z]+", text.replace("grey", "gray")))
                if intent in ("shape", "colour"):
                    assert answer == getattr(known, intent)
                    continue
                mentioned = (words & set(COLOURS)) | {s for s in SHAPES if s in words or f"{s}s" in words}
                assert answer == ("yes" if mentioned <= {shape, colour} else "no"), text
                answers[answer] += 1
    assert 0.4 < answers["yes"] / sum(answers.values()) < 0.6


def test_only_what_is_known_is_asked():
    random = np.random.default_rng(0)
    assert rephrase(KnownAttributes(None, None), random) is None
    for _ in range(300):
        later = bool(random.random() < 0.5)
        for known, value in ((KnownAttributes("circle", None), "circle"), (KnownAttributes(None, "gray"), "gray")):
            drawn = rephrase(known, random, later=later)
            assert drawn is not None and drawn.answer in (value, "yes", "no")


def test_rephrasing_depends_on_the_generator_alone():
    one, two = np.random.default_rng(7), np.random.default_rng(7)
    for _ in range(50):
        known = KnownAttributes("circle", "red")
        assert rephrase(known, one) == rephrase(known, two)


def test_the_surface_varies_and_the_words_stay():
    random, question = np.random.default_rng(0), "what color is the shape?"
    variants = [vary_surface(question, random) for _ in range(400)]
    words = {" ".join(re.findall("[a-z]+", variant.lower())) for variant in variants}
    assert words == {"what color is the shape"}
    for form in ("WHAT COLOR IS THE SHAPE?", "What color is the shape", "What color is the shape??"):
        assert form in variants
    assert any("  " in variant for variant in variants)


def test_every_intent_is_among_the_examples_of_the_tokenizer():
    texts = [question.text for question in trained_examples()]
    assert len(texts) == sum(len(ts) for s in (TRAINED, TRAINED.later) for ts in s.by_intent().values())
    assert len(INTENTS) == 5 and all(any(value in text for text in texts) for value in (*SHAPES, *COLOURS[:3]))
