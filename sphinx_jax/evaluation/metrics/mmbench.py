"""MMBench: a question counts only if it is answered rightly in every rotation of its options."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sphinx_jax.evaluation.metrics.averages import mean_accuracy
from sphinx_jax.evaluation.records import Aggregate, Record, Score

ROTATIONS = 1_000_000
"""Rows with an index from here on are rotations of the question at the remainder."""

_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))

_LAST_TOKENS = 4
"""A letter further from the end is taken for something else, such as an article."""


def read_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The one letter among the last tokens, else the one option whose text the answer has; None if there is none.

    Source: can_infer of open-compass/VLMEvalKit, vlmeval/utils/matching_util.py at 590f052, under exact matching. Left
    out: its list of refusals by online services, and a later rule (a67ace5) that reads "the answer is a dog" as A.
    """
    tokens = answer.translate(_BLANKS).split()
    letters = [letter for letter in options if letter in tokens]
    if len(letters) == 1 and tokens.index(letters[0]) >= len(tokens) - _LAST_TOKENS:
        return letters[0]
    if not letters and "Z" in tokens:
        return None
    return _option_by_text(answer.lower(), options)


def _option_by_text(answer: str, options: Mapping[str, str]) -> str | None:
    """None for an answer of more than twice the length of all options."""
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else None


class MMBenchCircular:
    """Source: mcq_circular_eval of open-compass/VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py at e8e78f0."""

    name = "circular accuracy"
    unit = "%"
    original = None

    def score(self, answer: str, record: Record) -> Score:
        letter = read_option(answer, record.extra["options"])
        return Score(float(letter in record.truths), letter)

    def aggregate(self, records: Sequence[Record], scores: Sequence[Score]) -> Aggregate:
        """Over questions, by category besides. Part `vanilla`: without rotations. Rotations alone count nothing."""
        values: dict[int, list[float]] = defaultdict(list)
        for record, score in zip(records, scores, strict=True):
            values[record.extra["index"] % ROTATIONS].append(score.value)
        pairs = zip(records, scores, strict=True)
        first = [(record, score) for record, score in pairs if record.extra["index"] < ROTATIONS]
        questions = [record for record, _ in first]
        circular = [Score(min(values[record.extra["index"]]), None) for record in questions]
        value, parts = mean_accuracy(questions, circular, "l2_category", "category")
        vanilla = mean_accuracy(questions, [score for _, score in first]).value
        return Aggregate(value, {"vanilla": vanilla} | parts)
