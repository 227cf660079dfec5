"""VQA accuracy: how many of ten people gave the answer (VQAv2, OKVQA, VizWiz, TextVQA)."""

from collections.abc import Sequence

from sphinx_jax.evaluation.metrics.averages import mean_accuracy
from sphinx_jax.evaluation.metrics.vqa_text import normalize, normalize_evalai, one_line, strip_punctuation
from sphinx_jax.evaluation.records import Aggregate, Record, Score


def agreement(answer: str, truths: Sequence[str]) -> float:
    """The mean over the truths of min(1, matches among the other truths / 3).

    With ten truths: 0, 0.3, 0.6, 0.9 for up to three matches, 1 for more.
    """
    count, matches = len(truths), sum(truth == answer for truth in truths)
    if not matches:
        return 0.0
    return (matches * min(3, matches - 1) + (count - matches) * min(3, matches)) / (3 * count)


class _Agreement:
    """What the three variants share: they differ in how text is normalised."""

    unit = "%"

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        return mean_accuracy(records, scores, "answer_type", "question_type")


class OriginalVqaAccuracy(_Agreement):
    """The original program's: the answer is always normalised; truths lose punctuation, only where they differ."""

    name = "VQA accuracy (original)"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        answer, truths = normalize(one_line(answer)), record.truths
        if len(set(truths)) > 1:
            truths = tuple(map(strip_punctuation, truths))
        return Score(agreement(answer, truths), answer)


class VqaAccuracy(_Agreement):
    """The official one: nothing is normalised where all truths are the same text, so "Yes" is no match of ten "yes".

    Source: VQAEval.evaluate of GT-Vision-Lab/VQA at a013f00.
    """

    name = "VQA accuracy"
    original = OriginalVqaAccuracy()

    def score(self, answer: str, record: Record) -> Score:
        answer, truths = one_line(answer), tuple(map(one_line, record.truths))
        if len(set(truths)) > 1:
            answer, truths = normalize(answer), tuple(map(normalize, truths))
        return Score(agreement(answer, truths), answer)


class EvalAIVqaAccuracy(_Agreement):
    """TextVQA's: both sides are always normalised. Source: TextVQAAccuracyEvaluator, see `normalize_evalai`."""

    name = "VQA accuracy (EvalAI)"
    original = OriginalVqaAccuracy()

    def score(self, answer: str, record: Record) -> Score:
        answer = normalize_evalai(answer)
        return Score(agreement(answer, tuple(map(normalize_evalai, record.truths))), answer)
