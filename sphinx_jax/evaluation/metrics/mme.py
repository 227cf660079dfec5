"""MME: accuracy of questions plus accuracy of images, summed over 14 subtasks."""

from collections import defaultdict
from collections.abc import Sequence

from sphinx_jax.evaluation.metrics.averages import percent
from sphinx_jax.evaluation.records import Aggregate, Record, Score

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_PREFIX = 4
"""Characters of an answer that are searched for yes, then no."""


def read_yes_no(answer: str) -> str | None:
    """yes or no, or None: "know" is no, "Answer: yes" is neither."""
    start = answer.lower()[:_PREFIX]
    return next((label for label in ("yes", "no") if label in start), None)


class Mme:
    """2,000 points of perception and 800 of cognition. An image counts if all its questions are right.

    Source: calculation.py in tools/eval_tool.zip of BradyFU/Awesome-Multimodal-Large-Language-Models at 1c1d69e.
    """

    name = "MME"
    unit = "points"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        label = read_yes_no(answer)
        return Score(float(any(truth.lower() == label for truth in record.truths)), label)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        """Perception plus cognition; both and each subtask are parts."""
        images: dict[str, dict[object, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record, score in zip(records, scores, strict=True):
            images[record.extra["subtask"]][record.image].append(score.value)
        points = {subtask: _points(list(images[subtask].values())) for subtask in sorted(images)}
        totals = {
            "perception": sum(points.get(subtask, 0.0) for subtask in PERCEPTION),
            "cognition": sum(points.get(subtask, 0.0) for subtask in COGNITION),
        }
        return Aggregate(sum(totals.values()), totals | points)


def _points(images: Sequence[Sequence[float]]) -> float:
    """Percent of the questions that are right plus percent of the images with all of them right."""
    questions = [value for image in images for value in image]
    return percent(questions) + percent([min(image) for image in images])
