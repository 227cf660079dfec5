"""How well a model answers easy-vqa's questions as people type them, and phrasings that it was never trained on.

python -m tests.instruments.easy_vqa_variants [CHECKPOINT] [COUNT]
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import sphinx_jax
from sphinx_jax.data import easy_vqa
from sphinx_jax.data.easy_vqa import Question
from sphinx_jax.data.easy_vqa_phrasings import HELD_BACK, INTENTS, TRAINED, Phrasings, fill
from sphinx_jax.sphinx import Sphinx

VARIANTS: dict[str, Callable[[str], str]] = {
    "original": lambda text: text,
    "first letter capital": lambda text: text[:1].upper() + text[1:],
    "all capitals": str.upper,
    "every word capital": str.title,
    "no question mark": lambda text: text.rstrip("?"),
    "two question marks": lambda text: f"{text}?",
    "space before the question mark": lambda text: text.replace("?", " ?"),
    "more spaces": lambda text: f"  {text.replace(' ', '  ', 2)}  ",
    "image mark": lambda text: f"<image>\n{text}",
    "capital without question mark": lambda text: (text[:1].upper() + text[1:]).rstrip("?"),
}
"""Changes to the text of a question that do not change what is asked."""

FIRST_QUESTIONS = (("what shape is in the image?", "shape"), ("what color is the shape?", "colour"))
"""What a conversation begins with before a phrasing of a later turn."""


def variant_accuracies(model: Sphinx, count: int) -> dict[str, float]:
    """Accuracy on `count` held-out questions, drawn from a fixed seed, by variant of their text."""
    records = easy_vqa.load("test")
    pairs = list(records.pairs())
    chosen = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:count]]
    images = [records.images[record] for record, _ in chosen]
    questions = [question for _, question in chosen]
    accuracies = {}
    for name, change in VARIANTS.items():
        answers = model.generate([change(question.text) for question in questions], images, max_new_tokens=8)
        accuracies[name] = easy_vqa.accuracy(questions, answers)["overall"]
    return accuracies


def phrasing_accuracies(model: Sphinx, phrasings: Phrasings, images_per_phrasing: int) -> dict[str, float]:
    """Accuracy on held-out images by phrasing, each asked of several images; those of later turns in a chat."""
    records, random = easy_vqa.load("test"), np.random.default_rng(1)
    known = [easy_vqa.known_attributes(questions) for questions in records.questions]
    usable = [i for i, attributes in enumerate(known) if attributes.shape and attributes.colour]

    def draw(template: str, intent: str) -> list[tuple[int, Question]]:
        chosen = random.choice(usable, images_per_phrasing, replace=False)
        return [(int(i), fill(template, intent, known[i], random)) for i in chosen]

    asked = {
        (template, intent): draw(template, intent) for intent in INTENTS for template in getattr(phrasings, intent)
    }
    flat = [(i, question) for drawn in asked.values() for i, question in drawn]
    texts = [VARIANTS["first letter capital"](question.text) for _, question in flat]
    answers = iter(model.generate(texts, [records.images[i] for i, _ in flat], max_new_tokens=8))
    accuracies = {}
    for (template, _), drawn in asked.items():
        accuracies[template] = easy_vqa.accuracy([q for _, q in drawn], [next(answers) for _ in drawn])["overall"]
    if phrasings.later is None:
        return accuracies
    for intent in INTENTS:
        for template in getattr(phrasings.later, intent):
            drawn, replies = draw(template, intent), []
            for number, (i, question) in enumerate(drawn):
                chat = model.chat(records.images[i], max_new_tokens=8)
                chat.ask(FIRST_QUESTIONS[number % len(FIRST_QUESTIONS)][0])
                replies.append(chat.ask(question.text))
            accuracies[f"(later) {template}"] = easy_vqa.accuracy([q for _, q in drawn], replies)["overall"]
    return accuracies


def main(checkpoint: str | Path = sphinx_jax.SHIPPED, count: str = "600") -> None:
    model = sphinx_jax.load(checkpoint, max_model_len=256)
    for name, accuracy in variant_accuracies(model, int(count)).items():
        print(f"{name:32} {accuracy:6.1%}")
    for title, phrasings in (("trained", TRAINED), ("held back", HELD_BACK)):
        accuracies = phrasing_accuracies(model, phrasings, 6 if title == "trained" else 20)
        print(f"{title} phrasings: {np.mean(list(accuracies.values())):.1%}")
        for template, accuracy in sorted(accuracies.items(), key=lambda item: item[1]):
            if accuracy < 0.95:
                print(f"  {accuracy:6.1%}  {template}")


if __name__ == "__main__":
    main(*sys.argv[1:])
