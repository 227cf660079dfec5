"""MMMU: accuracy of letters, and of open answers that have the truth in one of their conclusions."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from sphinx_jax.evaluation.metrics.averages import mean_accuracy
from sphinx_jax.evaluation.records import Aggregate, Record, Score

_ENDS = ",.!?;:'"
"""Stripped from an answer's ends in this order, each once."""

_LONG = 5
"""Tokens above which an answer without a letter is searched for the options' texts."""

_CONCLUSIONS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")

_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(,\d{3})+\b"),
    re.compile(r"-?\d+(\.\d+)?e[+-]?\d+"),
    re.compile(r"-?(\d*\.\d+|\d+\b)(?!e[+-]?\d|[,\d])"),
)
"""In lower case: grouped by commas, with an exponent, plain."""


def read_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The last "(B)", else the last " B ", else in a long answer the last option's text; None if there is none.

    Source: parse_multi_choice_response of MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py at bb0b95a, which draws a
    letter where this gives None.
    """
    for mark in _ENDS:
        answer = answer.strip(mark)
    answer = f" {answer} "
    letter = _last(answer, options, "({})".format) or _last(answer, options, " {} ".format)
    if letter is None and len(answer.split()) > _LONG:
        letter = _last(answer.lower(), options, lambda option: options[option].lower())
    return letter


def _last(answer: str, options: Mapping[str, str], sought: Callable[[str], str]) -> str | None:
    """The option whose sought text begins last in the answer; the first of them if several begin there."""
    found = {option: answer.rfind(sought(option)) for option in options}
    last = max(found, key=lambda option: found[option], default=None)
    return last if last is not None and found[last] >= 0 else None


def comparable(text: str) -> list[str | float]:
    """A number rounded to two places, else the text in lower case; one character with a space on either side."""
    text = text.strip()
    with suppress(ValueError):
        return [round(float(text.replace(",", "")), 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def conclusions(answer: str) -> list[str]:
    """What follows the last conclusive phrase of each line, the shortest of them; the whole answer if none does.

    In the last line an equals sign is such a phrase.
    """
    answer = answer.strip().strip(".").lower()
    *lines, last = answer.split("\n")
    found = [_tail(line, _CONCLUSIONS) for line in lines] + [_tail(last, (*_CONCLUSIONS, "="))]
    return [tail for tail in found if tail and tail not in tuple(":,.!?;'")] or [answer]


def _tail(line: str, phrases: Sequence[str]) -> str:
    """As in the official program, an empty tail gives way to that of the next phrase."""
    shortest = ""
    for phrase in phrases:
        if phrase in line:
            tail = line.rsplit(phrase, 1)[1].strip()
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
    return shortest


def open_match(answer: str, truths: Sequence[str]) -> bool:
    """Whether a conclusion has a truth's text in it, or is or has a truth's number.

    Source: parse_open_response and eval_open, as in `read_option`.
    """
    expected = [value for truth in truths for value in comparable(truth)]
    tails = conclusions(answer)
    numbers = [found[0] for tail in tails for pattern in _NUMBERS for found in pattern.finditer(tail)]
    given = [value for text in tails + numbers for value in comparable(text)]
    return any(_agrees(value, expected) for value in given)


def _agrees(given: str | float, expected: Sequence[str | float]) -> bool:
    if isinstance(given, str):
        return any(isinstance(text, str) and text in given for text in expected)
    return given in expected


class Mmmu:
    """All questions count alike; parts by subject."""

    name = "accuracy"
    unit = "%"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        if record.extra["question_type"] == "multiple-choice":
            letter = read_option(answer, record.extra["options"])
            return Score(float(letter in record.truths), letter)
        return Score(float(open_match(answer, record.truths)), answer)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        return mean_accuracy(records, scores, "subject")
