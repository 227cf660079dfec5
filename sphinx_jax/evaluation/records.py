"""What readers, metrics and the runner share: a question, the score of its answer, and what a metric is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable


@dataclass(frozen=True)
class Record:
    """One question about one image.

    `number`: the line or record of its file, from 1. `image`: a path as written in the file, encoded bytes, or None.
    `truths`: the accepted answers; a letter where options are asked for. `question_id`: as written; no key, since
    several benchmarks repeat it.

    `extra` holds what the metric of a benchmark needs:

    | benchmark | keys |
    | --- | --- |
    | VQA | `answer_type`, `question_type` (optional) |
    | ChartQA | `split`: human or augmented |
    | MME | `subtask`; the two questions of an image share `image` |
    | POPE | `split`: random, popular or adversarial |
    | RefCOCO | `box`: x1, y1, x2, y2 in pixels; `width`, `height` in pixels |
    | options | `options`: letter to text, in order |
    | SEED | `options`; `question_type`; `split`: image or video |
    | MMBench | `options`; `index`; `category`, `l2_category` (optional) |
    | MMMU | `question_type`: multiple-choice or open; `options`; `subject` |
    """

    number: int
    image: str | bytes | None
    question: str
    truths: tuple[str, ...]
    question_id: str | int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Score(NamedTuple):
    """The score of one answer. `matched`: what the answer was read as; None if it could not be read, which is wrong."""

    value: float
    """From 0 to 1."""
    matched: str | None


class Aggregate(NamedTuple):
    """The value of a benchmark, and of its parts by name, in the metric's unit."""

    value: float
    parts: dict[str, float]


@runtime_checkable
class Metric(Protocol):
    """How a benchmark scores answers. Implementations are immutable, and raise for no answer whatever it is."""

    @property
    def name(self) -> str:
        """As in papers: "VQA accuracy"."""
        ...

    @property
    def unit(self) -> str:
        """`%` or `points`."""
        ...

    @property
    def original(self) -> "Metric | None":
        """The original program's own scorer, where it gives another value."""
        ...

    def score(self, answer: str, record: Record) -> Score:
        """The score of one answer. The model's text comes as generated, without the stop string."""
        ...

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        """The value over all questions, in any order. A failed question has Score(0, None)."""
        ...
