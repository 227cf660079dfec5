"""Text normalisation of VQA accuracy: punctuation, numbers, articles and contractions.

Source of the rules: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py at a013f00.
"""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Neither colon nor apostrophe."""

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

_MOST_PERIODS = 32
"""The official program passes a flag of this value where `re.sub` expects the greatest count."""

_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

_ARTICLES = frozenset(("a", "an", "the"))

_ENDINGS = {
    "n't": (
        *("ai", "are", "ca", "could", "did", "do", "does", "had", "has", "have", "is"),
        *("might", "must", "need", "ought", "sha", "should", "was", "were", "wo", "would"),
    ),
    "n't've": ("could", "had", "might", "should", "would"),
    "'ve": ("could", "might", "must", "not", "should", "they", "we", "what", "where", "who", "would", "you"),
    "'d": ("he", "how", "it", "someone", "something", "there", "they", "where", "who", "you"),
    "'d've": (
        *("he", "it", "she", "somebody", "someone", "something"),
        *("there", "they", "we", "who", "y'all", "you"),
    ),
    "'ll": ("how", "it", "somebody", "someone", "something", "they", "what", "who", "why", "y'all", "you"),
    "'s": ("he", "how", "somebody", "someone", "that", "there", "what", "when", "where", "who", "why"),
    "'re": ("there", "they", "what", "why", "you"),
}
"""Endings of contractions, and what the official program expects before them."""

_CONTRACTED = (
    *(stem + ending for ending, stems in _ENDINGS.items() for stem in stems),
    *("y'all", "ma'am", "o'clock", "'twas", "'ow's'at"),
)


def _without_one_apostrophe(text: str) -> list[str]:
    return [text[:at] + text[at + 1 :] for at, character in enumerate(text) if character == "'"]


CONTRACTIONS = {short: full for full in _CONTRACTED for short in _without_one_apostrophe(full)}
"""What lacks one apostrophe, to its full form."""
CONTRACTIONS["somebody'd"] = "somebodyd"  # The official table has this one the wrong way round.


def one_line(text: str) -> str:
    """Newlines and tabs are spaces; none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Each mark is deleted if it is next to a space anywhere or a comma groups digits; else it becomes a space.

    Periods that no digit follows are deleted.
    """
    groups_digits = _DIGIT_COMMA_DIGIT.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        deleted = groups_digits or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if deleted else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def plain_tokens(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, contractions with their apostrophe, single spaces."""
    tokens = (_NUMBERS.get(token, token) for token in text.lower().split())
    return " ".join(CONTRACTIONS.get(token, token) for token in tokens if token not in _ARTICLES)


def normalize(text: str) -> str:
    """The official normalisation of an answer."""
    return plain_tokens(strip_punctuation(text))


def normalize_evalai(text: str) -> str:
    """TextVQA's: commas and question marks go first, and a possessive becomes a token of its own.

    Source: EvalAIAnswerProcessor of facebookresearch/pythia, as in LLaVA's llava/eval/m4c_evaluator.py at c121f04.
    """
    spaced = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize(one_line(spaced))
