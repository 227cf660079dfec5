"""What holds of every metric, whatever the answers."""

import random

import pytest

from sphinx_jax.evaluation.records import Score
from tests.evaluation.test_metrics_golden import CASES

HOSTILE = (
    *(
        "",
        " ",
        "\n",
        "\t\r\n",
        ".",
        "[",
        "]",
        "[]",
        "[,,,]",
        "()",
        "%",
        "%%",
        "-",
        "\\",
        "'",
        "\x00",
        "\ud800",
        "a\udcff b",
    ),
    *("1" * 5000, "[" * 5000, "a " * 5000, ". " * 5000, "1," * 3000, "é" * 5000, "\ud83d" * 2000, "=" * 5000),
    *(
        "[1e400,-1e400,nan,inf]",
        "[1,2,3,4]" * 500,
        "nan",
        "-inf",
        "1e400",
        "1_0",
        "١٢٣",
        "½",
        "İ",
        "ﬁ",
        "\u202eB",
        "(A)(B)(C)",
    ),
    *("The answer is ", "The answer is A. The answer is B.", "none", "Z", "so so is is = =", "1,000,000.5e10", "inf%"),
)

METRICS = [
    pytest.param(metric, case.made, id=f"{name}-{metric.name}")
    for name, case in CASES.items()
    for metric in (case.metric, case.metric.original)
    if metric is not None
]

every_metric = pytest.mark.parametrize(("metric", "made"), METRICS)


@every_metric
@pytest.mark.parametrize("seed", range(5))
def test_order_changes_nothing(metric, made, seed):
    """To the last bit."""
    answered = made(seed)
    scores = [metric.score(answer, record) for record, answer in answered]
    shuffled = list(zip(answered, scores, strict=True))
    random.Random(seed).shuffle(shuffled)
    before = metric.aggregate([record for record, _ in answered], scores)
    after = metric.aggregate([record for (record, _), _ in shuffled], [score for _, score in shuffled])
    assert before == after
    assert before.value > 0


@every_metric
def test_every_answer_has_a_score(metric, made):
    for record, _ in made(3)[::20]:
        for answer in HOSTILE:
            score = metric.score(answer, record)
            assert 0 <= score.value <= 1
            assert score.matched is None or isinstance(score.matched, str)
            assert score.matched is not None or score.value == 0


@every_metric
def test_made_scores_are_fractions(metric, made):
    scores = [metric.score(answer, record) for seed in range(10) for record, answer in made(seed)]
    assert all(0 <= score.value <= 1 for score in scores)
    assert {score.value for score in scores} >= {0, 1}


@every_metric
def test_least_and_greatest_value(metric, made):
    """All wrong, and all right."""
    records = [record for record, _ in made(4)]
    wrong = metric.aggregate(records, [Score(0.0, "wrong")] * len(records))
    assert wrong.value == 0
    right = metric.aggregate(records, [Score(1.0, "right")] * len(records))
    assert right.value == pytest.approx(2800 if metric.unit == "points" else 100)
    assert all(0 <= value <= 100 or metric.unit == "points" for value in right.parts.values())


@every_metric
def test_failed_questions_are_wrong(metric, made):
    """Where answers were right and every seventh question fails, the value is lower."""
    answered = made(5)
    records = [record for record, _ in answered]
    scores = [metric.score(answer, record) for record, answer in answered]
    best = metric.aggregate(records, scores).value
    failed = [Score(0.0, None) if number % 7 == 0 else score for number, score in enumerate(scores)]
    assert metric.aggregate(records, failed).value < best


@pytest.mark.parametrize("name", CASES)
def test_no_question_no_error(name):
    assert CASES[name].metric.aggregate([], []).value == 0


def test_the_originals_draws_follow_the_file():
    """The same draws whatever the order; about a fifth is right. Failed questions are not drawn."""
    metric = CASES["letters"].metric.original
    assert metric is not None
    records = [record for record, _ in CASES["letters"].made(7)]
    scores = [metric.score("?", record) for record in records]
    value = metric.aggregate(records, scores).value
    assert 10 < value < 30
    assert value == metric.aggregate(records[::-1], scores[::-1]).value
    assert metric.aggregate(records, [Score(0.0, None)] * len(records)).value == 0
