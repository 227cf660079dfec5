"""ANLS (DocVQA): average normalized Levenshtein similarity."""

from collections.abc import Sequence

from sphinx_jax.evaluation.metrics.averages import mean_accuracy
from sphinx_jax.evaluation.records import Aggregate, Record, Score

THRESHOLD = 0.5


def levenshtein(first: str, second: str) -> int:
    """The least number of insertions, deletions and replacements of characters."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def similarity(answer: str, truth: str) -> float:
    """1 minus the distance of the plain texts over the longer length of the texts as written, in upper case."""
    length = max(len(answer.upper()), len(truth.upper()))
    return 1.0 - levenshtein(_plain(answer), _plain(truth)) / length if length else 1.0


class Anls:
    """The best similarity to a truth; 0 below one half.

    Source: evaluate_method of infographicsvqa_eval.py, the script of the DocVQA challenges.
    """

    name = "ANLS"
    unit = "%"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        best = max((similarity(answer, truth) for truth in record.truths), default=0.0)
        return Score(best if best >= THRESHOLD else 0.0, answer)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        return mean_accuracy(records, scores)
