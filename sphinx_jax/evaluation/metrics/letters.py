"""Accuracy of option letters (ScienceQA, Q-Bench, SEED-Bench)."""

import re
from collections.abc import Collection, Sequence

from sphinx_jax.evaluation.metrics.averages import mean_accuracy
from sphinx_jax.evaluation.metrics.exact import LETTERS, OriginalAccuracy
from sphinx_jax.evaluation.records import Aggregate, Record, Score

_LETTER_FIRST = re.compile(r"\(([A-Z])\)|([A-Z])\.|([A-Za-z])$")
_SENTENCE = re.compile(r"The answer is \(?([A-Z])\b")


def read_letter(answer: str, letters: Collection[str]) -> str | None:
    """The letter of "B", "b", "B.", "B. text", "(B)" or one "The answer is B"; None if there is none, or no option.

    These are what LLaVA's eval_science_qa.py at c121f04 and lmms-eval's scienceqa/utils.py at 75571cf read, and "(B)".
    """
    answer = answer.strip()
    first = _LETTER_FIRST.match(answer)
    found = [first[first.lastindex or 0].upper()] if first else _SENTENCE.findall(answer)
    return found[0] if len(found) == 1 and found[0] in letters else None


def option_letters(record: Record) -> Sequence[str]:
    """The letters of the question's options; A to E where the file does not list them."""
    return tuple(record.extra.get("options") or LETTERS)


class LetterAccuracy:
    """An answer without a letter is wrong."""

    name = "accuracy of letters"
    unit = "%"
    original = OriginalAccuracy()

    def score(self, answer: str, record: Record) -> Score:
        letter = read_letter(answer, option_letters(record))
        return Score(float(letter in record.truths), letter)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        return mean_accuracy(records, scores)


class SeedAccuracy:
    """The first character is the letter. Source: lmms-eval's seedbench/utils.py at 75571cf."""

    name = "accuracy of first letters"
    unit = "%"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        letter = answer.strip()[:1].upper()
        if letter not in option_letters(record):
            return Score(0.0, None)
        return Score(float(letter in record.truths), letter)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        return mean_accuracy(records, scores, "split", "question_type")
