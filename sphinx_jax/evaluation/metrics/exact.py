"""Exact match (GQA, VSR, OCR-VQA, AI2D), and the original program's accuracy."""

import random
from collections.abc import Sequence

from sphinx_jax.evaluation.metrics.averages import mean_accuracy, percent
from sphinx_jax.evaluation.records import Aggregate, Record, Score

LETTERS = ("A", "B", "C", "D", "E")

SEED = 1
"""The original program's default."""


DRAWN = "drawn"
"""What the original program reads an answer as that it cannot read."""


class OriginalAccuracy:
    """The original program's: every period is removed; where the truth is a letter, an unreadable answer is drawn.

    The draws are the original's: one generator a benchmark, in the order of the file.
    """

    name = "accuracy (original)"
    unit = "%"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        if any(truth in LETTERS for truth in record.truths):
            letter = answer.split(".")[0]
            return Score(float(letter in record.truths), letter) if letter in LETTERS else Score(0.0, DRAWN)
        text = self._plain(answer)
        return Score(float(any(self._plain(truth) == text for truth in record.truths)), text)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        generator = random.Random(SEED)
        in_order = sorted(zip(records, scores, strict=True), key=lambda pair: pair[0].number)
        values = [
            float(generator.choice(LETTERS) in record.truths) if score.matched == DRAWN else score.value
            for record, score in in_order
        ]
        return Aggregate(percent(values), {})

    @staticmethod
    def _plain(text: str) -> str:
        return text.replace(".", "").strip().lower()


class ExactMatch:
    """Equal but for case, spaces at the ends and trailing periods.

    Source: LLaVA's convention for GQA's evaluation, scripts/convert_gqa_for_eval.py at c121f04.
    """

    name = "exact match"
    unit = "%"
    original = OriginalAccuracy()

    def score(self, answer: str, record: Record) -> Score:
        text = self._plain(answer)
        return Score(float(any(self._plain(truth) == text for truth in record.truths)), text)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        return mean_accuracy(records, scores)

    @staticmethod
    def _plain(text: str) -> str:
        return text.strip().rstrip(".").lower()
