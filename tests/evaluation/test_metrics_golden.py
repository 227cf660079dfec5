"""Every metric against the official programs, on 200 made answers a benchmark.

The expected numbers in tests/golden/evaluation were computed by the official programs themselves, which are no part of
this repository; `how` in each file names repository, commit and function. No official program reads "(B)" or an
unfinished "The answer is B" as ScienceQA's letter: those expectations are written here, by the definition.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sphinx_jax.evaluation.metrics.anls import Anls
from sphinx_jax.evaluation.metrics.exact import DRAWN, ExactMatch
from sphinx_jax.evaluation.metrics.grounding import BoxIou
from sphinx_jax.evaluation.metrics.letters import LetterAccuracy, SeedAccuracy
from sphinx_jax.evaluation.metrics.mmbench import MMBenchCircular
from sphinx_jax.evaluation.metrics.mme import Mme
from sphinx_jax.evaluation.metrics.mmmu import Mmmu
from sphinx_jax.evaluation.metrics.pope import Pope
from sphinx_jax.evaluation.metrics.relaxed import RelaxedAccuracy
from sphinx_jax.evaluation.metrics.vqa import EvalAIVqaAccuracy, VqaAccuracy
from sphinx_jax.evaluation.records import Metric, Record
from tests.evaluation import made_answers

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"
SEED = 18


class Case(NamedTuple):
    metric: Metric
    made: Callable[[int], list[made_answers.Answered]]


CASES = {
    "vqa": Case(VqaAccuracy(), made_answers.vqa),
    "textvqa": Case(EvalAIVqaAccuracy(), made_answers.vqa),
    "chartqa": Case(RelaxedAccuracy(), made_answers.chartqa),
    "docvqa": Case(Anls(), made_answers.docvqa),
    "mme": Case(Mme(), made_answers.mme),
    "pope": Case(Pope(), made_answers.pope),
    "refcoco": Case(BoxIou(), made_answers.refcoco),
    "exact": Case(ExactMatch(), made_answers.exact),
    "letters": Case(LetterAccuracy(), made_answers.letters),
    "seed": Case(SeedAccuracy(), made_answers.letters),
    "mmbench": Case(MMBenchCircular(), made_answers.mmbench),
    "mmmu": Case(Mmmu(), made_answers.mmmu),
}

every_case = pytest.mark.parametrize("name", CASES)
with_original = pytest.mark.parametrize("name", ["vqa", "chartqa", "exact", "letters"])


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def records_of(stored: dict[str, Any]) -> list[Record]:
    return [
        Record(
            row["number"],
            row.get("image"),
            f"question {row['number']}",
            tuple(row["truths"]),
            row["number"],
            row["extra"],
        )
        for row in stored["answers"]
    ]


def expected_value(name: str, row: dict[str, Any]) -> float:
    """Of one answer; the letter that it is read as for MMBench, both programs' values for letters."""
    if name == "mmbench":
        return float(row["expected"] == row["truths"][0])
    if name == "letters":
        return max(row["expected"].values(), default=0.0) or float(further_letter(row["answer"]) == row["truths"][0])
    return float(row["expected"])


def further_letter(answer: str) -> str | None:
    found = re.match(r"\(([A-E])\)", answer) or re.fullmatch(r"The answer is \(?([A-E])(\)\.)?", answer)
    return found[1] if found else None


def scored(metric: Metric, stored: dict[str, Any]):
    return [
        metric.score(row["answer"], record) for row, record in zip(stored["answers"], records_of(stored), strict=True)
    ]


@every_case
def test_the_stored_answers_are_the_made_ones(name):
    """So the golden files belong to these answers."""
    stored = golden(name)
    made = CASES[name].made(SEED)
    assert len(made) == 200
    assert records_of(stored) == [record for record, _ in made]
    assert [row["answer"] for row in stored["answers"]] == [answer for _, answer in made]


@every_case
def test_each_answer(name):
    stored = golden(name)
    rows = zip(stored["answers"], scored(CASES[name].metric, stored), strict=True)
    wrong = [(row, score) for row, score in rows if abs(score.value - expected_value(name, row)) > 1e-9]
    assert not wrong, wrong[:5]


def test_option_that_mmbench_reads():
    stored = golden("mmbench")
    assert [score.matched for score in scored(MMBenchCircular(), stored)] == [
        row["expected"] for row in stored["answers"]
    ]


@pytest.mark.parametrize("name", sorted(set(CASES) - {"letters"}))
def test_aggregate(name):
    stored, metric = golden(name), CASES[name].metric
    aggregate = metric.aggregate(records_of(stored), scored(metric, stored))
    assert aggregate.value == pytest.approx(stored["value"], abs=1e-8)
    assert aggregate.parts == pytest.approx(stored["parts"], abs=1e-8)


def test_aggregate_of_letters():
    stored, metric = golden("letters"), LetterAccuracy()
    right = sum(expected_value("letters", row) for row in stored["answers"])
    assert metric.aggregate(records_of(stored), scored(metric, stored)).value == pytest.approx(100 * right / 200)


@with_original
def test_original(name):
    """Each answer but those that the original draws a letter for, and the value with the draws."""
    stored, metric = golden(name), CASES[name].metric.original
    assert metric is not None
    scores = scored(metric, stored)
    for row, score in zip(stored["answers"], scores, strict=True):
        assert score.matched == DRAWN or score.value == pytest.approx(row["original"], abs=1e-9), row
    assert metric.aggregate(records_of(stored), scores).value == pytest.approx(stored["original"], abs=1e-8)


@with_original
def test_the_original_gives_another_value(name):
    """Else there would be nothing to report beside."""
    stored, metric = golden(name), CASES[name].metric
    value = metric.aggregate(records_of(stored), scored(metric, stored)).value
    assert value != pytest.approx(stored["original"])
