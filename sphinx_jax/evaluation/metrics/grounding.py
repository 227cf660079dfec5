"""Accuracy of boxes (RefCOCO, RefCOCO+, RefCOCOg): intersection over union of at least one half."""

import re
from collections.abc import Sequence

import numpy as np

from sphinx_jax.evaluation.metrics.averages import mean_accuracy
from sphinx_jax.evaluation.records import Aggregate, Record, Score

THRESHOLD = 0.5

Box = Sequence[float | np.float32]
"""x1, y1, x2, y2."""

_BRACKETS = re.compile(r"\[(.*?)\]")


def read_box(answer: str) -> Box | None:
    """The four numbers in the first brackets, or up to the first closing one; None if there are not four."""
    found = _BRACKETS.search(answer)
    text = found[1] if found else answer.split("]")[0]
    try:
        x1, y1, x2, y2 = map(float, text.split(","))
    except ValueError:
        return None
    return x1, y1, x2, y2


def in_padded_square(box: Box, width: int, height: int) -> Box:
    """The box in pixels of the image padded to a square, as the model sees it. Whole pixels, as padding has."""
    x, y = max(0, height - width) // 2, max(0, width - height) // 2
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def intersection_over_union(first: Box, second: Box) -> float:
    """In float32, as the original program computes it. A reversed box overlaps nothing: 0."""
    with np.errstate(all="ignore"):
        a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
        sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), np.float32(0))
        overlap = sides[0] * sides[1]
        union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap
        return float(np.nan_to_num(overlap / union)) if overlap > 0 else 0.0


class BoxIou:
    """The answer's box has fractions of the padded square; the truth has pixels of the image.

    Source: the metric miou0.5 of Alpha-VLLM/LLaMA2-Accessory, accessory/eval_mm/evaluate.py at 3777c43.
    """

    name = "accuracy at IoU 0.5"
    unit = "%"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        box = read_box(answer)
        if box is None:
            return Score(0.0, None)
        width, height = record.extra["width"], record.extra["height"]
        pixels = tuple(np.asarray(box, np.float32) * np.float32(max(width, height)))
        truth = in_padded_square(record.extra["box"], width, height)
        right = intersection_over_union(pixels, truth) >= THRESHOLD
        return Score(float(right), "[" + ", ".join(map(str, box)) + "]")

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        return mean_accuracy(records, scores)
