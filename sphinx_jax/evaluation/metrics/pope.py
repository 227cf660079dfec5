"""POPE: precision and recall of "yes" to questions about objects that are or are not in an image."""

from collections import defaultdict
from collections.abc import Sequence

from sphinx_jax.evaluation.records import Aggregate, Record, Score

_NO = frozenset(("No", "no", "not"))


def says_no(answer: str) -> bool:
    """Whether the first sentence has one of No, no, not; every other answer is a yes, an empty one too."""
    return not _NO.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))


class Pope:
    """The mean F1 of the splits.

    Source: evaluate.py of AoiDragon/POPE at 08d957b. A failed question counts as answered wrongly.
    """

    name = "POPE F1"
    unit = "%"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        label = "no" if says_no(answer) else "yes"
        return Score(float(label == _truth(record)), label)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        """Parts: accuracy, precision, recall, F1 and the fraction of answers that are yes, each split."""
        splits: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
        for record, score in zip(records, scores, strict=True):
            present = _truth(record) == "yes"
            splits[record.extra.get("split", "all")].append((present, present == bool(score.value)))
        rates = {split: _rates(splits[split]) for split in sorted(splits)}
        parts = {f"{split}/{name}": value for split, named in rates.items() for name, value in named.items()}
        return Aggregate(sum(named["F1"] for named in rates.values()) / max(1, len(rates)), parts)


def _truth(record: Record) -> str:
    """The official program takes every label but "no" for yes."""
    return "no" if "no" in record.truths else "yes"


def _rates(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Percentages from (truth is yes, answer is yes); 0 where nothing is counted."""
    count = len(pairs)
    both = sum(truth and answer for truth, answer in pairs)
    truths, answers = sum(truth for truth, _ in pairs), sum(answer for _, answer in pairs)
    return {
        "accuracy": 100.0 * sum(truth == answer for truth, answer in pairs) / count,
        "precision": 100.0 * both / max(1, answers),
        "recall": 100.0 * both / max(1, truths),
        "F1": 200.0 * both / max(1, truths + answers),
        "yes": 100.0 * answers / count,
    }
