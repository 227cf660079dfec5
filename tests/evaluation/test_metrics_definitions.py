"""The metrics' definitions, one consequence a line, derived by hand from the official programs' text."""

import hashlib

import pytest

from sphinx_jax.evaluation.metrics.anls import Anls, levenshtein
from sphinx_jax.evaluation.metrics.exact import ExactMatch
from sphinx_jax.evaluation.metrics.grounding import BoxIou, in_padded_square, intersection_over_union, read_box
from sphinx_jax.evaluation.metrics.letters import LetterAccuracy, SeedAccuracy
from sphinx_jax.evaluation.metrics.mmbench import MMBenchCircular
from sphinx_jax.evaluation.metrics.mmbench import read_option as read_mmbench
from sphinx_jax.evaluation.metrics.mme import COGNITION, PERCEPTION, Mme
from sphinx_jax.evaluation.metrics.mmmu import Mmmu, open_match
from sphinx_jax.evaluation.metrics.mmmu import read_option as read_mmmu
from sphinx_jax.evaluation.metrics.pope import Pope
from sphinx_jax.evaluation.metrics.relaxed import RelaxedAccuracy
from sphinx_jax.evaluation.metrics.vqa import EvalAIVqaAccuracy, VqaAccuracy
from sphinx_jax.evaluation.metrics.vqa_text import CONTRACTIONS, normalize
from sphinx_jax.evaluation.records import Metric, Record, Score


def record(*truths: str, number: int = 1, image: str | None = None, **extra) -> Record:
    return Record(number, image, "?", truths, None, extra)


def value(metric: Metric, answer: str, *truths: str, **extra) -> float:
    return metric.score(answer, record(*truths, **extra)).value


# VQA accuracy


def test_contractions_are_the_official_ones():
    """The digest of the table in vqaEval.py (GT-Vision-Lab/VQA at a013f00), without its entries that change nothing."""
    table = "\n".join(f"{short} {full}" for short, full in sorted(CONTRACTIONS.items()))
    assert (
        hashlib.sha256(table.encode()).hexdigest() == "f2c800b1132e79302dd72686ce8bba16120f1873f98a85561222e89317336e7a"
    )


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_vqa_leaves_one_truth_out(matches, expected):
    assert value(VqaAccuracy(), "cat", *["cat"] * matches, *["dog"] * (10 - matches)) == pytest.approx(expected)


def test_vqa_of_ten_equal_truths_is_not_normalized():
    assert value(VqaAccuracy(), "Yes", *["yes"] * 10) == 0
    assert value(VqaAccuracy(), " yes\n", *["yes"] * 10) == 1
    assert value(VqaAccuracy(), "Yes", *["yes"] * 9, "no") == 1
    assert value(VqaAccuracy().original, "Yes", *["yes"] * 10) == 1
    assert value(EvalAIVqaAccuracy(), "Yes", *["yes"] * 10) == 1


def test_vqa_numbers_as_text():
    assert value(VqaAccuracy(), "two", *["2"] * 9, "3") == 1
    assert value(VqaAccuracy().original, "2", *["two"] * 9, "3") == 0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("dont", "don't"),
        ("1,000", "1000"),
        ("the red.", "red"),
        ("u.s.a", "usa"),
        ("0.5", "0.5"),
        ("T-shirt", "t shirt"),
        ("t -shirt x-ray", "t shirt xray"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("none", "0"),
        ("Zero", "0"),
        ("man's hat", "man's hat"),
        ("10:30", "10:30"),
        ("somebody'd", "somebodyd"),
        ("a the an", ""),
        ("." * 40, "." * 8),
    ],
)
def test_vqa_normalization(text, normal):
    assert normalize(text) == normal


def test_evalai_possessives_and_question_marks():
    assert value(EvalAIVqaAccuracy(), "Joe's", *["joe 's"] * 10) == 1
    assert value(EvalAIVqaAccuracy(), "what?no", *["whatno"] * 10) == 1


# Relaxed accuracy


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("100", "95", 0),
        ("95", "100", 1),
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("5%", "0.05", 1),
        ("5%", "5", 0),
        ("5", "5%", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("2,017", "2017", 0),
        ("1960", "2017", 1),
        ("Red", "red", 1),
        (" red ", "red", 1),
        ("red.", "red", 0),
        ("nan", "nan", 0),
    ],
)
def test_relaxed_accuracy(answer, truth, expected):
    assert value(RelaxedAccuracy(), answer, truth) == expected


def test_the_originals_tolerance_is_of_the_answer():
    assert value(RelaxedAccuracy().original, "100", "95") == 1
    assert value(RelaxedAccuracy().original, "95", "100") == 0


def test_chartqa_is_the_mean_of_its_splits():
    records = [record("1", split="human"), *[record("1", split="augmented")] * 3]
    aggregate = RelaxedAccuracy().aggregate(records, [Score(1, "1"), Score(0, "2"), Score(0, "2"), Score(1, "1")])
    assert aggregate.parts == pytest.approx({"split/human": 100, "split/augmented": 100 / 3})
    assert aggregate.value == pytest.approx((100 + 100 / 3) / 2)


# ANLS


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_levenshtein(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance


def test_anls():
    assert value(Anls(), "  Ab  ", "ab") == 1
    assert value(Anls(), "ab", "ax") == 0.5
    assert value(Anls(), "abc", "axx") == 0
    assert value(Anls(), "abc", "zzz", "abd") == pytest.approx(2 / 3)
    assert value(Anls(), "", "") == 1
    assert value(Anls(), "a   x", "a b") == pytest.approx(1 - 1 / 5), "divided by the longer raw text"
    assert value(Anls(), "anything") == 0, "no truth"


# MME and POPE


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" yes", "yes"),
        ("  yes.", None),
        ("Answer: yes", None),
        ("None", "no"),
        ("know", "no"),
        ("Nope", "no"),
        ("YES!", "yes"),
        ("", None),
    ],
)
def test_mme_reads_four_characters(answer, label):
    for truth in ("Yes", "No"):
        assert Mme().score(answer, record(truth)) == Score(float(truth.lower() == label), label)


def test_mme_points():
    """One of two images with both questions right: 75 for the questions and 50 for the images."""
    records = [record("Yes", image=image, subtask="OCR") for image in ("a", "b", "a", "b")]
    aggregate = Mme().aggregate(records, [Score(1, "yes"), Score(1, "yes"), Score(1, "yes"), Score(0, "no")])
    assert aggregate.parts == {"perception": 125, "cognition": 0, "OCR": 125}
    assert aggregate.value == 125
    assert len(PERCEPTION) == 10 and len(COGNITION) == 4


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("No", "no"),
        ("NO", "yes"),
        ("There is not, I think", "no"),
        ("Yes. It is not", "yes"),
        ("no,", "no"),
        ("none", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_the_first_sentence(answer, label):
    assert Pope().score(answer, record("no")) == Score(float(label == "no"), label)


def test_pope_rates():
    """Truths yes yes no no, answers yes no yes no: all rates are a half."""
    records = [record("yes"), record("yes"), record("no"), record("no")]
    aggregate = Pope().aggregate(records, [Score(1, "yes"), Score(0, "no"), Score(0, "yes"), Score(1, "no")])
    assert set(aggregate.parts.values()) == {50.0}
    records = [record("no", split="random"), record("yes", split="popular")]
    aggregate = Pope().aggregate(records, [Score(1, "no"), Score(1, "yes")])
    assert aggregate.parts["random/F1"] == 0 and aggregate.value == 50, "no yes among truths and answers"


# Boxes


def test_boxes_are_compared_in_the_padded_square():
    assert in_padded_square((0, 0, 10, 10), 640, 427) == (0, 106, 10, 116)
    assert in_padded_square((0, 0, 10, 10), 427, 640) == (106, 0, 116, 10)
    box = {"box": (0, 0, 100, 50), "width": 100, "height": 50}
    assert value(BoxIou(), "[0,0.25,1,0.75]", "", **box) == 1
    assert value(BoxIou(), "[0,0,1,0.5]", "", **box) == 0
    assert value(BoxIou(), "[0,0.25,0.5,0.75]", "", **box) == 1, "an IoU of one half is right"


@pytest.mark.parametrize(
    ("box", "answer", "expected"),
    [
        ((84, 112, 136, 368), "[0.131,0.3,0.172,0.7]", 1),
        ((83, 16, 307, 192), "[0.13,0.15,0.305,0.425]", 1),
        ((242, 128, 476, 208), "[0.378,0.325,0.561,0.45]", 0),
    ],
)
def test_half_a_box_is_decided_in_float32(box, answer, expected):
    """Computed with torch: 0.5, 0.50000006 and 0.49999994 in float32, and the other side of one half in float64."""
    assert value(BoxIou(), answer, "", box=box, width=640, height=480) == expected


def test_reversed_boxes_overlap_nothing():
    box = (0.0, 0.0, 4.0, 4.0)
    nan = float("nan")
    for given in ((4, 4, 0, 0), (4, 0, 0, 4), (0, 4, 4, 0), (0, 0, 0, 0), (nan, nan, nan, nan)):
        assert intersection_over_union(given, box) == 0
    assert intersection_over_union(box, box) == 1
    assert intersection_over_union((0, 0, 2, 4), box) == 0.5


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("It is [0.1, 0.2,0.3,0.4].", (0.1, 0.2, 0.3, 0.4)),
        ("0,0,1,1] and more", (0, 0, 1, 1)),
        ("[0,0,1,1][1,1,1,1]", (0, 0, 1, 1)),
        ("[0,0,1]", None),
        ("[a,b,c,d]", None),
        ("", None),
    ],
)
def test_first_brackets(answer, box):
    assert read_box(answer) == box


# Exact match and letters


def test_exact_match():
    assert value(ExactMatch(), " Red. ", "red") == 1
    assert value(ExactMatch(), "0.5", "05") == 0
    assert value(ExactMatch().original, "0.5", "05") == 1
    assert value(ExactMatch(), "a red", "red") == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("B. text", "B"),
        ("(B)", "B"),
        ("(B) text", "B"),
        ("The answer is B.", "B"),
        ("The answer is Blue.", None),
        ("Answer: B.", None),
        ("Blue", None),
        ("D", None),
        ("", None),
    ],
)
def test_letters_of_three_options(answer, letter):
    assert LetterAccuracy().score(answer, record("B", options={"A": "", "B": "", "C": ""})).matched == letter


def test_unread_letters_are_wrong_here_and_drawn_by_the_original():
    unread = [record("B", number=number) for number in range(1000)]
    metric = LetterAccuracy()
    assert metric.aggregate(unread, [metric.score("blue", unread[0])] * 1000).value == 0
    assert 15 < metric.original.aggregate(unread, [metric.original.score("blue", unread[0])] * 1000).value < 25


def test_seed_reads_the_first_character():
    assert value(SeedAccuracy(), " Blue", "B") == 1
    assert SeedAccuracy().score("the", record("B")) == Score(0, None)


# MMBench and MMMU

OPTIONS = {"A": "dog", "B": "cat", "C": "teddy bear", "D": "red"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Answer: B.", "B"),
        ("(B) cat", "B"),
        ("B it is then", "B"),
        ("B is what I choose", None),
        ("A or B", None),
        ("a Teddy Bear", "C"),
        ("dog or cat", None),
        ("a cat, as is plain from the whiskers, the tail and the eyes", None),
        ("Z", None),
        ("Z. cat", None),
        ("", None),
    ],
)
def test_mmbench_options(answer, letter):
    assert read_mmbench(answer, OPTIONS) == letter


def test_circular_needs_every_rotation():
    indices = (1, 1_000_001, 2_000_001, 2, 1_000_002, 3_000_009)
    records = [record("A", index=index, options=OPTIONS) for index in indices]
    aggregate = MMBenchCircular().aggregate(records, [Score(v, "A") for v in (1, 1, 0, 1, 1, 0)])
    assert (aggregate.value, aggregate.parts) == (50, {"vanilla": 100})


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(A) or rather (B).", "B"),
        ("A B", "B"),
        ("(A) B", "A"),
        ("(A) or (B), no (A)", "A"),
        ("B.,", "B"),
        ("B,.", None),
        ("It is the red one now", "D"),
        ("It is the old red", None),
        ("red", None),
        ("b", None),
    ],
)
def test_mmmu_options(answer, letter):
    assert read_mmmu(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("1,234.567", "1234.57", True),
        ("2.5e3", "2500", True),
        ("x = 8", "8", True),
        ("-3", "3", False),
        ("a major seventh chord", "major seventh", True),
        ("so it is a major\nno", "major", True),
        ("major? The answer is minor", "major", False),
        ("value", "V", False),
        ("x = 3,14", "3", False),
        ("it could be a fifth", "could", False),
        ("the answer is :", "answer", True),
        ("chord v of c", "V", True),
        ("", "8", False),
    ],
)
def test_mmmu_open_answers(answer, truth, right):
    assert open_match(answer, [truth]) is right
    assert value(Mmmu(), answer, truth, question_type="open") == right
