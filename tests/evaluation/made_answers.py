"""Made records and odd answers for every metric: 200 a benchmark, the same for the same seed."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from sphinx_jax.evaluation.metrics.mme import COGNITION, PERCEPTION
from sphinx_jax.evaluation.records import Record

Answered = tuple[Record, str]

PHRASES = (
    *("yes", "no", "Yes", "2", "3", "two", "none", "0", "ten", "red", "the red bus", "a dog", "an apple", "dog"),
    *("dont know", "don't know", "youd've", "somebody'd", "Im here", "1,000", "1000", "10,000 people", "u.s.a", "usa"),
    *(
        "0.5",
        "5.",
        "t-shirt",
        "t shirt",
        "stop sign!",
        "10:30",
        "café",
        "北京",
        "left/right",
        "left / right",
        "man's hat",
    ),
    *("100%", "$5", "coca-cola, inc.", "Coca Cola Inc", "what? no", "(blue)", "[blue]", "a", "the", "wi-fi @ home"),
    *("2017", "2,017", "half", "unanswerable", "ice_cream", "ice-cream", "o'clock", "oclock", "7 oclock", "ñandú"),
)

JUNK = (
    "",
    " ",
    ".",
    "...",
    "?",
    "\n",
    "\t",
    "I do not know.",
    "###",
    "<unk>",
    "¿?",
    "x" * 300,
    "Ω≈ç√",
    "😀",
    "-",
    "a an the",
)


def _pick(rng: random.Random, *choices: Any) -> Any:
    return rng.choice(choices)


def _odd(rng: random.Random, text: str) -> str:
    """The text, or a way in which models write it."""
    return _pick(
        rng,
        text,
        text,
        text.upper(),
        text.title(),
        f"{text}.",
        f" {text}  ",
        f"\n{text}\t",
        f"the {text}",
        f"A {text}",
        f"Answer: {text}.",
        f"The answer is {text}.",
        text.replace(" ", "  "),
        text.replace("'", ""),
        f'"{text}"',
        f"{text}, {text}",
        f"{text}...",
        text[:-1],
    )


def _make(seed: int, one: Callable[[random.Random, int], Answered], count: int = 200) -> list[Answered]:
    rng = random.Random(seed)
    return [one(rng, number) for number in range(1, count + 1)]


def _record(number: int, truths: Sequence[str], image: str | None = None, **extra: Any) -> Record:
    return Record(number, image, f"question {number}", tuple(truths), number, extra)


def vqa(seed: int) -> list[Answered]:
    """Ten truths, of which from one to ten agree."""

    def one(rng: random.Random, number: int) -> Answered:
        kinds = rng.sample(PHRASES, _pick(rng, 1, 2, 3, 4))
        if rng.random() < 0.5:
            kinds += [_odd(rng, kinds[0])]
        truths = [rng.choice(kinds) for _ in range(10)]
        answer = _odd(rng, rng.choice(truths)) if rng.random() < 0.8 else rng.choice(PHRASES + JUNK)
        types = {"answer_type": _pick(rng, "yes/no", "number", "other"), "question_type": _pick(rng, "is the", "what")}
        return _record(number, truths, **types), answer

    return _make(seed, one)


def chartqa(seed: int) -> list[Answered]:
    """Numbers up to 6 % off, percentages, years, zeros and labels."""

    def number_near(rng: random.Random, value: float) -> str:
        near = value * _pick(rng, 1, 1, 0.94, 0.95, 0.951, 1.049, 1.05, 1.0526, 1.06)
        return _pick(
            rng,
            f"{near:g}",
            f"{near:.2f}",
            f"{near:g}%",
            f"{near / 100:g}",
            f"{near:,.0f}",
            f" {near:g} ",
            f"${near:g}",
        )

    def one(rng: random.Random, number: int) -> Answered:
        value = _pick(rng, 0, 100, 95, 5, 0.05, 2017, -12.5, 1234567, rng.uniform(0, 100), rng.randrange(1900, 2030))
        truth = _pick(rng, f"{value:g}", f"{value:g}", f"{value:.2f}", f"{value:g}%", rng.choice(PHRASES), "nan", "0.0")
        near = number_near(rng, value)
        answer = _pick(rng, near, near, near, _odd(rng, truth), truth.swapcase(), rng.choice(PHRASES + JUNK), "inf")
        return _record(number, [truth], split=_pick(rng, "human", "augmented")), answer

    return _make(seed, one)


def docvqa(seed: int) -> list[Answered]:
    """One to three truths; answers with a few characters changed, cut or doubled."""
    texts = (
        *PHRASES,
        "T.F. Riehl",
        "March 15, 1998",
        "P.O. Box 1234, Springfield",
        "STRASSE",
        "straße",
        "İstanbul",
        "ab",
        "abcd",
    )

    def changed(rng: random.Random, text: str) -> str:
        characters = list(text)
        for _ in range(rng.randrange(1 + len(text))):
            at = rng.randrange(len(characters) + 1)
            characters[at : at + rng.randrange(2)] = _pick(rng, "", "x", " ", "é")
        return "".join(characters)

    def one(rng: random.Random, number: int) -> Answered:
        truths = rng.sample(texts, _pick(rng, 1, 1, 2, 3)) if rng.random() < 0.95 else [""]
        truth = rng.choice(truths)
        return _record(number, truths), _pick(rng, truth, _odd(rng, truth), changed(rng, truth), rng.choice(JUNK))

    return _make(seed, one)


YES_NO = (
    *(
        "yes",
        "no",
        "Yes",
        "No",
        "Yes.",
        "No.",
        "YES!",
        "NO",
        " yes",
        "  yes.",
        " no",
        "Answer: yes",
        "Answer: no",
        "None",
    ),
    *(
        "know",
        "Nope",
        "not",
        "Not sure",
        "maybe",
        "",
        " ",
        "yesterday",
        "Now",
        "y",
        "n",
        "Yes, there is no dog.",
        "はい",
    ),
    *(
        "There is not a dog.",
        "There is no, dog",
        "It is. Not a dog.",
        "no\u00a0dog",
        "Yes, not no",
        "nein",
        "Non",
        "no-one",
    ),
)


def mme(seed: int) -> list[Answered]:
    """Two questions an image, seven or eight images a subtask."""
    rng = random.Random(seed)
    subtasks = [*PERCEPTION, *COGNITION] * 8
    made = []
    for place, subtask in enumerate(subtasks[:100]):
        for truth in ("Yes", "No"):
            answer = _pick(rng, truth, truth, truth, truth.lower() + ".", rng.choice(YES_NO))
            made.append((_record(len(made) + 1, [truth], f"{subtask}/{place:04}.png", subtask=subtask), answer))
    return made


def pope(seed: int) -> list[Answered]:
    """Three splits of yes and no."""

    def one(rng: random.Random, number: int) -> Answered:
        truth = _pick(rng, "yes", "no")
        answer = _pick(rng, truth, truth.title(), f"{truth.title()}, it is.", *rng.sample(YES_NO, 3))
        return _record(number, [truth], split=("random", "popular", "adversarial")[number % 3]), answer

    return _make(seed, one)


def refcoco(seed: int) -> list[Answered]:
    """Boxes in fractions of the padded square, three digits, near the truth or far from it, in several spellings."""

    def spelled(rng: random.Random, box: Sequence[float]) -> str:
        x1, y1, x2, y2 = (f"{value:.3f}" for value in box)
        plain = f"[{x1},{y1},{x2},{y2}]"
        return _pick(
            rng,
            *[plain] * 8,
            f"[{x1}, {y1}, {x2}, {y2}]",
            f"It is at {plain}.",
            f"{x1},{y1},{x2},{y2}]",
            f"{x1},{y1},{x2},{y2}",
            f"{plain} and [0,0,1,1]",
            f"[{x2},{y2},{x1},{y1}]",
            f"[{x2},{y1},{x1},{y2}]",
            f"[{x1},{y1},{x2}]",
            f"[{x1},{y1},{x2},{y2},1]",
            f"[{x1};{y1};{x2};{y2}]",
            f"[[{x1},{y1},{x2},{y2}]]",
            f"[{x1},{y1},\n{x2},{y2}]",
            f"[{x1},{y1},{x2},nan]",
            f"[{x1},{y1},inf,{y2}]",
            f"({x1},{y1},{x2},{y2})",
            "[]",
            "",
            "the dog on the left",
        )

    def one(rng: random.Random, number: int) -> Answered:
        width, height = _pick(rng, (640, 480), (480, 640), (427, 640), (640, 427), (500, 500), (333, 640))
        x1, y1 = rng.randrange(width - 20), rng.randrange(height - 20)
        box = [x1, y1, rng.randrange(x1 + 10, width), rng.randrange(y1 + 10, height)]
        if rng.random() < 0.3:
            box = [value + rng.choice((0.5, 0.25, 0.01)) for value in box]
        side, x, y = max(width, height), max(0, height - width) // 2, max(0, width - height) // 2
        spread = _pick(rng, 0, 0.02, 0.1, 0.2) * (box[2] - box[0])
        given = [
            (value + shift + rng.uniform(-spread, spread)) / side
            for value, shift in zip(box, (x, y, x, y), strict=True)
        ]
        if rng.random() < 0.15:  # Half of the box: an IoU of one half, but for rounding.
            given[2] = (given[0] + given[2]) / 2
        return _record(number, [str(box)], box=box, width=width, height=height), spelled(rng, given)

    return _make(seed, one)


def exact(seed: int) -> list[Answered]:
    """Short truths, and a few that are single letters, as AI2D's labels are."""

    def one(rng: random.Random, number: int) -> Answered:
        truth = _pick(rng, rng.choice(PHRASES).rstrip("."), rng.choice(("A", "B", "true", "false", "05", "u.s.")))
        answer = rng.choice(("true", "false", "A.", "B", "C", "b", *JUNK)) if rng.random() < 0.3 else _odd(rng, truth)
        return _record(number, [truth], options=None), answer

    return _make(seed, one)


OBJECTS: tuple[str, ...] = (
    "dog",
    "cat",
    "teddy bear",
    "red",
    "blue car",
    "a man",
    "None of the above",
    "12",
    "北京",
    "Photosynthesis",
)


def _options(rng: random.Random, count: int) -> dict[str, str]:
    return dict(zip("ABCDE", rng.sample(OBJECTS, count), strict=False))


def _chosen(rng: random.Random, letter: str, options: dict[str, str]) -> str:
    """Ways in which models choose an option."""
    text = options[letter]
    return _pick(
        rng,
        *[letter] * 12,
        *[f"{letter}. {text}"] * 4,
        f"{letter}.",
        f"{letter}.{text}",
        f"({letter})",
        f"({letter}) {text}",
        f"{letter})",
        f"{letter}: {text}",
        f" {letter} ",
        f"{letter}\n",
        letter.lower(),
        f"Answer: {letter}.",
        f"The answer is {letter}.",
        f"The answer is {letter}",
        f"The answer is ({letter}).",
        f"The answer is {letter}. The answer is {letter}.",
        f"I think that the correct choice here is surely {letter}",
        f"{letter} is what I would choose, all things considered",
        f"A dog is not there, so it must be {letter}",
        f"{letter} or {rng.choice('ABCD')}",
        text,
        text.upper(),
        f"It is {text}.",
        f"There is {text} in this image, as one can see from its shape, its size and everything that stands around it.",
        f"{text} or {options['A']}",
        "Z",
        "F",
        "E",
        "I am not sure",
        "",
        "北",
    )


def letters(seed: int) -> list[Answered]:
    """Two to five options."""

    def one(rng: random.Random, number: int) -> Answered:
        options = _options(rng, _pick(rng, 2, 3, 4, 4, 5))
        truth, said = rng.choice(list(options)), rng.choice(list(options))
        answer = _chosen(rng, _pick(rng, truth, truth, said), options)
        kind = {
            "split": _pick(rng, "image", "video"),
            "question_type": _pick(rng, "Scene Understanding", "Visual Reasoning"),
        }
        return _record(number, [truth], options=options, **kind), answer

    return _make(seed, one)


def mmbench(seed: int) -> list[Answered]:
    """Fifty questions in four rotations each; the rows are shuffled."""
    rng = random.Random(seed)
    made: list[tuple[dict[str, Any], str, str]] = []
    for question in range(50):
        texts, right, skill = rng.sample(OBJECTS, 4), rng.randrange(4), _pick(rng, 1, 1, 1, 0.7)
        kind = {"category": _pick(rng, "ocr", "celebrity"), "l2_category": _pick(rng, "coarse", "fine")}
        for turn in range(4):
            options = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
            truth = "ABCD"[(right - turn) % 4]
            said = truth if rng.random() < skill else rng.choice("ABCD")
            plain = _pick(rng, said, f"{said}.", f"{said}. {options[said]}", options[said], f"({said})")
            answer = plain if rng.random() < 0.8 else _chosen(rng, said, options)
            made.append(({"index": question + turn * 1_000_000, "options": options, **kind}, truth, answer))
    rng.shuffle(made)
    return [(_record(number, [truth], **extra), answer) for number, (extra, truth, answer) in enumerate(made, 1)]


def mmmu(seed: int) -> list[Answered]:
    """Three of four with options, the others open: numbers and short texts."""

    def open_answer(rng: random.Random, truth: str) -> str:
        return _pick(
            rng,
            truth,
            _odd(rng, truth),
            f"x = {truth}",
            f"The result is 7.\nThus the final answer is {truth}.",
            f"So it could be {truth}\nor 3,141 or 2.5e3",
            f"It is = {truth} = 4 is ",
            f"about -{truth}",
            "1,234.567",
            "2.5e3",
            rng.choice(JUNK),
        )

    def one(rng: random.Random, number: int) -> Answered:
        subject = _pick(rng, "Accounting", "Art", "Music")
        if number % 4:
            options = _options(rng, _pick(rng, 2, 4, 5))
            truth = rng.choice(list(options))
            answer = _chosen(rng, _pick(rng, truth, truth, rng.choice(list(options))), options)
            return _record(number, [truth], question_type="multiple-choice", options=options, subject=subject), answer
        truths = rng.sample(
            ("2500", "1234.57", "8", "-3", "0.333", "V", "major seventh", "3,141", "6.5e2", "Trichome"),
            _pick(rng, 1, 1, 2),
        )
        return _record(number, truths, question_type="open", subject=subject), open_answer(rng, rng.choice(truths))

    return _make(seed, one)
