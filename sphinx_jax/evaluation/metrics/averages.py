"""Means over questions and over parts of a benchmark, in percent."""

from collections import defaultdict
from collections.abc import Sequence
from math import fsum

from sphinx_jax.evaluation.records import Aggregate, Record, Score


def percent(values: Sequence[float]) -> float:
    """100 times the mean; 0 of no values. The sum is exact, so the order of questions does not change it."""
    return 100.0 * fsum(values) / len(values) if values else 0.0


def values_by(key: str, records: Sequence[Record], scores: Sequence[Score]) -> dict[str, list[float]]:
    """The scores' values by what `extra[key]` says, sorted by it; records without the key are left out."""
    groups: dict[str, list[float]] = defaultdict(list)
    for record, score in zip(records, scores, strict=True):
        if record.extra.get(key) is not None:
            groups[str(record.extra[key])].append(score.value)
    return dict(sorted(groups.items()))


def percent_by(key: str, records: Sequence[Record], scores: Sequence[Score]) -> dict[str, float]:
    """Percentages by part, named `key/what extra[key] says`."""
    return {f"{key}/{part}": percent(values) for part, values in values_by(key, records, scores).items()}


def mean_accuracy(records: Sequence[Record], scores: Sequence[Score], *part_keys: str) -> Aggregate:
    """The mean over all questions, and the parts by each of `part_keys`, in percent."""
    parts: dict[str, float] = {}
    for key in part_keys:
        parts |= percent_by(key, records, scores)
    return Aggregate(percent([score.value for score in scores]), parts)
