"""Relaxed accuracy (ChartQA): numbers may be 5 % off."""

from collections.abc import Sequence

from sphinx_jax.evaluation.metrics.averages import percent, percent_by
from sphinx_jax.evaluation.records import Aggregate, Record, Score

TOLERANCE = 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(reference: str, text: str) -> bool:
    """Whether `text` is within 5 % of the reference, or equal but for case where one is no number or the reference 0.

    Source: relaxed_correctness of google-research/pix2struct, pix2struct/metrics.py at 945f27e.
    """
    number, target = _number(text), _number(reference)
    if number is None or not target:
        return text.lower() == reference.lower()
    return abs(number - target) / abs(target) <= TOLERANCE


class _Relaxed:
    unit = "%"

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        """The mean of the splits' values, human and augmented; of all questions where no split is named."""
        parts = percent_by("split", records, scores)
        value = percent([score.value for score in scores])
        return Aggregate(sum(parts.values()) / len(parts) if parts else value, parts)


class OriginalRelaxedAccuracy(_Relaxed):
    """The original program's: answer and truth are swapped, so the 5 % are of the answer."""

    name = "relaxed accuracy (original)"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        answer = answer.strip()
        return Score(float(any(relaxed_match(answer, truth) for truth in record.truths)), answer)


class RelaxedAccuracy(_Relaxed):
    """The official one: the 5 % are of the truth."""

    name = "relaxed accuracy"
    original = OriginalRelaxedAccuracy()

    def score(self, answer: str, record: Record) -> Score:
        answer = answer.strip()
        return Score(float(any(relaxed_match(truth, answer) for truth in record.truths)), answer)
