"""Ways to ask for the shape and the colour in an image: the phrasings that `nano` trains on, and those held back.

easy-vqa has 24 forms of question, all lower case and all with a question mark. These hand-written phrasings cover the
ways in which people ask instead. Each is lower case and has no question mark: `vary_surface` adds case, punctuation
and spaces. `TRAINED` phrasings are drawn in training (`rephrase`); `HELD_BACK` ones never are: they measure whether
the model understands phrasings that it has not seen.

Placeholders: in `shape` and `colour` phrasings `{shape}` and `{colour}` are what the image shows. In `is_shape`
phrasings `{shape}` is the value asked for, in `is_colour` ones `{colour}`, in `is_both` ones both; the answer is yes or
no, and the other placeholder is what the image shows.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


class Question(NamedTuple):
    text: str
    answer: str


class KnownAttributes(NamedTuple):
    """Shape and colour of an image, None where unknown."""

    shape: str | None
    colour: str | None


@dataclasses.dataclass(frozen=True)
class Phrasings:
    """Phrasings by what they ask for. All may open a conversation, but those of `later`, which need a turn before."""

    shape: tuple[str, ...]
    colour: tuple[str, ...]
    is_shape: tuple[str, ...]
    is_colour: tuple[str, ...]
    is_both: tuple[str, ...]
    later: "Phrasings | None" = None

    def by_intent(self) -> dict[str, tuple[str, ...]]:
        return {intent: getattr(self, intent) for intent in INTENTS}


INTENTS = ("shape", "colour", "is_shape", "is_colour", "is_both")

TRAINED = Phrasings(
    shape=(
        *("what shape is it", "what shape is this", "what shape is that", "what shape is there", "what shape is shown"),
        *("what shape do you see", "what shape can you see", "what shape can be seen", "what shape does it have"),
        *("what shape does the object have", "what shape has it", "what shape was drawn", "what shape is drawn here"),
        *("what shape is in the image", "what shape does the image show", "what shape is the object"),
        *("which shape is it", "which shape is this", "which shape is there", "which shape is shown"),
        *("which shape do you see", "which shape can you see", "which shape does the image show"),
        *("which shape does the image contain", "which shape is in the image", "which shape is present"),
        *("what is the shape", "what is its shape", "what is the shape of it", "what is the shape of the object"),
        *("what is the shape in the image", "what is the name of the shape", "what is this shape called"),
        *("what would you call this shape", "what kind of shape is it", "what kind of shape is this"),
        *("what type of shape is it", "what sort of shape is this", "what figure is it", "what figure do you see"),
        *("what form does it have", "what object is it", "what object do you see", "what is it", "what is this"),
        *("what is that", "what is shown", "what is in the image", "what is drawn in the image", "what do you see"),
        *("what can you see", "what does the image show", "what does the image contain", "what do we have here"),
        *("name the shape", "tell me the shape", "say the shape", "give me the shape", "identify the shape"),
        *("describe the shape", "show me that you know the shape", "i want to know the shape", "guess the shape"),
        *("tell me what shape it is", "tell me what shape this is", "tell me which shape you see"),
        *("can you tell me the shape", "can you tell me what shape it is", "can you name the shape"),
        *("could you tell me the shape", "could you tell me which shape it is", "do you know what shape it is"),
        *("do you know the shape", "do you know which shape this is", "do you see what shape it is"),
        *("it has what shape", "the shape is what", "this is what shape", "shape", "the shape", "its shape"),
        *("is it a circle, a rectangle or a triangle", "is this a triangle, a circle or a rectangle"),
        *("circle, rectangle or triangle", "which one is it, triangle, rectangle or circle"),
        *(
            "what is it an image of",
            "what is this an image of",
            "what geometric shape is this",
            "what form is displayed",
        ),
        *(
            "which geometric form is displayed in the image",
            "what is depicted",
            "what shape is depicted",
            "what form is it",
        ),
        *("which geometric figure is it", "what figure is shown in the image", "is it a circle or a triangle or what"),
        *(
            "what is the {colour} shape",
            "what {colour} shape is it",
            "what {colour} shape do you see",
            "what is {colour}",
        ),
        *("which shape is {colour}", "tell me what the {colour} shape is", "name the {colour} shape"),
        *(
            "what shape is the {colour} object",
            "what shape does the {colour} object have",
            "what is the {colour} object",
        ),
    ),
    colour=(
        *("what color is it", "what color is this", "what color is that", "what color is there", "what color is shown"),
        *("what color do you see", "what color can you see", "what color can be seen", "what color does it have"),
        *("what color does the shape have", "what color has it", "what color was used", "what color is used here"),
        *("what color is in the image", "what color does the image show", "what color is the object"),
        *("which color is it", "which color is this", "which color is there", "which color is shown"),
        *("which color do you see", "which color can you see", "which color does the shape have"),
        *("which color does it have", "which color is in the image", "which color is the shape", "which color has it"),
        *("what is the color", "what is its color", "what is the color of it", "what is the color of the object"),
        *("what is the color in the image", "what is the name of the color", "what is this color called"),
        *("what would you call this color", "what kind of color is it", "what kind of color is this"),
        *("what color is the shape in the image", "in what color is it drawn", "in which color is the shape drawn"),
        *(
            "what color is the drawn shape",
            "how is it colored",
            "how is the shape colored",
            "what color was it drawn in",
        ),
        *("name the color", "tell me the color", "say the color", "give me the color", "identify the color"),
        *("describe the color", "show me that you know the color", "i want to know the color", "guess the color"),
        *("tell me what color it is", "tell me what color the shape is", "tell me which color you see"),
        *("can you tell me the color", "can you tell me what color it is", "can you name the color"),
        *("could you tell me the color", "could you tell me which color it is", "do you know what color it is"),
        *("do you know the color", "do you know which color this is", "do you see what color it is"),
        *("it has what color", "the color is what", "this is what color", "color", "the color", "its color"),
        *("name the color of the shape", "tell me the color of the shape", "the color of the shape"),
        *("what hue is it", "what hue does it have", "what is its hue", "which tone is it", "what color is it painted"),
        *("which color is depicted", "what color is displayed", "is it red or green or what color", "what tint has it"),
        *("what color is the {shape}", "which color is the {shape}", "what color does the {shape} have"),
        *("what is the color of the {shape}", "tell me the color of the {shape}", "which color has the {shape}"),
        *("the color of the {shape}", "can you tell me what color the {shape} is", "how is the {shape} colored"),
    ),
    is_shape=(
        *("is it a {shape}", "is this a {shape}", "is that a {shape}", "is the shape a {shape}", "is there a {shape}"),
        *("is the object a {shape}", "is its shape a {shape}", "is the shape in the image a {shape}"),
        *("is there any {shape}", "are there any {shape}s", "is a {shape} shown", "is a {shape} visible"),
        *("is a {shape} in the image", "is a {shape} drawn", "is what you see a {shape}", "is one {shape} present"),
        *("do you see a {shape}", "can you see a {shape}", "do you see any {shape}", "can you find a {shape}"),
        *("can a {shape} be seen", "could it be a {shape}", "could this be a {shape}", "have you found a {shape}"),
        *("does the image show a {shape}", "does the image have a {shape}", "does the image include a {shape}"),
        *("does it show a {shape}", "does it contain a {shape}", "does it look like a {shape}"),
        *("does the object look like a {shape}", "does it have the shape of a {shape}", "do we have a {shape}"),
        *("would you call it a {shape}", "would you say it is a {shape}", "do you know if it is a {shape}"),
        *("was a {shape} drawn", "it is a {shape}, right", "it is a {shape}", "this is a {shape}", "i see a {shape}"),
        *("tell me if it is a {shape}", "tell me whether there is a {shape}", "can you tell me if it is a {shape}"),
        *("i want to know if this is a {shape}", "yes or no, is it a {shape}", "{shape}", "a {shape}"),
        *("is the {colour} shape a {shape}", "is the {colour} object a {shape}", "is it true that it is a {shape}"),
        *("is it a {shape} or not", "is this object a {shape} or not", "is there a {shape} or not", "any {shape}"),
        *("is it a {shape}, yes or no", "is a {shape} depicted", "is a {shape} displayed", "it is a {shape}, isn't it"),
        *("is it an image of a {shape}", "does the image depict a {shape}", "is it shaped like a {shape}"),
    ),
    is_colour=(
        *("is it {colour}", "is this {colour}", "is that {colour}", "is the shape {colour}", "is the object {colour}"),
        *("is the color {colour}", "is its color {colour}", "is the color of the shape {colour}"),
        *("is the shape in the image {colour}", "is it a {colour} shape", "is this a {colour} shape"),
        *("is there anything {colour}", "is there something {colour}", "is anything {colour}", "is there any {colour}"),
        *("is there a {colour} object", "are there any {colour} shapes", "is a {colour} shape shown"),
        *("is a {colour} shape visible", "is {colour} in the image", "is {colour} the color", "is {colour} its color"),
        *(
            "is it drawn in {colour}",
            "is the shape drawn in {colour}",
            "is what you see {colour}",
            "is it colored {colour}",
        ),
        *("do you see {colour}", "do you see a {colour} shape", "do you see anything {colour}", "can you see {colour}"),
        *("can you see a {colour} shape", "can you find a {colour} shape", "can a {colour} shape be seen"),
        *("could it be {colour}", "could this be {colour}", "have you found a {colour} shape", "do we have {colour}"),
        *(
            "does the image show a {colour} shape",
            "does the image have a {colour} shape",
            "does the image show {colour}",
        ),
        *("does it look {colour}", "does the shape look {colour}", "does it have the color {colour}"),
        *("does it contain a {colour} shape", "would you call it {colour}", "would you say it is {colour}"),
        *("do you know if it is {colour}", "was it drawn in {colour}", "it is {colour}, right", "it is {colour}"),
        *("this is {colour}", "i see {colour}", "tell me if it is {colour}", "tell me whether the shape is {colour}"),
        *("can you tell me if it is {colour}", "i want to know if this is {colour}", "yes or no, is it {colour}"),
        *("is it {colour} or not", "is the shape {colour} or not", "is this {colour} or not", "anything {colour}"),
        *("is it {colour}, yes or no", "is it painted {colour}", "is {colour} displayed", "it is {colour}, isn't it"),
        *("is its hue {colour}", "is it of {colour} color", "is {colour} used", "is it shown in {colour}"),
        *(
            "{colour}",
            "is the {shape} {colour}",
            "is the color of the {shape} {colour}",
            "is it true that it is {colour}",
        ),
    ),
    is_both=(
        *("is it a {colour} {shape}", "is this a {colour} {shape}", "is that a {colour} {shape}"),
        *("is there a {colour} {shape}", "is the shape a {colour} {shape}", "is a {colour} {shape} in the image"),
        *("is a {colour} {shape} shown", "do you see a {colour} {shape}", "can you see a {colour} {shape}"),
        *("does the image show a {colour} {shape}", "does the image contain a {colour} {shape}", "{colour} {shape}"),
        *("it is a {colour} {shape}", "would you call it a {colour} {shape}", "can you find a {colour} {shape}"),
    ),
    later=Phrasings(
        shape=(
            *("and the shape", "and its shape", "and what shape is it", "and which shape", "and what is the shape"),
            *("what about the shape", "what about its shape", "how about the shape", "now the shape", "what shape"),
            *("which shape", "and what is it", "then what shape is it", "what shape is it then", "so what is it"),
        ),
        colour=(
            *("and the color", "and its color", "and what color is it", "and which color", "and what is the color"),
            *("what about the color", "what about its color", "how about the color", "now the color", "what color"),
            *("which color", "and how is it colored", "then what color is it", "what color is it then"),
        ),
        is_shape=(
            *("and is it a {shape}", "or is it a {shape}", "what about a {shape}", "how about a {shape}"),
            *("or a {shape}", "and a {shape}", "so is it a {shape}", "so it is a {shape}", "maybe a {shape}"),
            *("is it a {shape} then", "then is it a {shape}", "is it a {shape} instead", "and is there a {shape}"),
        ),
        is_colour=(
            *("and is it {colour}", "or is it {colour}", "what about {colour}", "how about {colour}", "or {colour}"),
            *("and {colour}", "so is it {colour}", "so it is {colour}", "maybe {colour}", "is it {colour} then"),
            *("then is it {colour}", "is it {colour} instead", "and is the {shape} {colour}"),
        ),
        is_both=("and is it a {colour} {shape}", "or is it a {colour} {shape}", "so it is a {colour} {shape}"),
    ),
)

HELD_BACK = Phrasings(
    shape=(
        *("what shape am i looking at", "can you say what shape this is", "could you name the shape you see here"),
        *("the object has what shape", "do you recognize the shape", "which figure does the image show"),
        *("i would like to know the shape of this object", "what is the shape that you can see"),
        *("help me to find out what shape this is", "please give the name of the shape in the image"),
    ),
    colour=(
        *("what color am i looking at", "can you say what color this is", "could you name the color you see here"),
        *("the shape has what color", "do you recognize the color", "which color did they use for the shape"),
        *("i would like to know the color of this object", "what is the color that you can see"),
        *("what color would you say it is", "please give the name of the color in the image"),
    ),
    is_shape=(
        *("do you think it is a {shape}", "am i looking at a {shape}", "would you say that this is a {shape}"),
        *("could the object be a {shape}", "is it correct that there is a {shape}", "did they draw a {shape}"),
        *("does this look like a {shape} to you", "is the object in the image a {shape}", "can i see a {shape} here"),
        *("i think this is a {shape}, is that right",),
    ),
    is_colour=(
        *("do you think it is {colour}", "am i looking at something {colour}", "would you say that this is {colour}"),
        *("could the object be {colour}", "is it correct that the shape is {colour}", "did they draw it in {colour}"),
        *(
            "does this look {colour} to you",
            "is the object in the image {colour}",
            "has the shape got a {colour} color",
        ),
        *("i think this is {colour}, is that right",),
    ),
    is_both=("do you think it is a {colour} {shape}", "am i looking at a {colour} {shape}"),
    later=Phrasings(
        shape=(
            "good, and what shape is that",
            "now tell me its shape",
            "and the shape of it",
            "thanks, which shape was it",
        ),
        colour=(
            "good, and what color is that",
            "now tell me its color",
            "and the color of it",
            "thanks, which color was it",
        ),
        is_shape=(
            "okay, but is it a {shape}",
            "could it also be a {shape}",
            "does that mean it is a {shape}",
            "perhaps a {shape} then",
        ),
        is_colour=(
            "okay, but is it {colour}",
            "could it also be {colour}",
            "perhaps {colour} then",
            "does that mean it is {colour}",
        ),
        is_both=("okay, but is it a {colour} {shape}",),
    ),
)

OPENINGS = (
    *("please ", "please, ", "ok, ", "okay ", "hi, ", "hello, ", "hello ", "hey, ", "so ", "so, ", "now ", "well, "),
    *("thanks, ", "good, ", "tell me, ", "please tell me, ", "can you tell me, ", "could you say, ", "i would ask, "),
    *("look at the image, ", "in the image, ", "in this image, ", "about the image: ", "question: ", "i think, "),
)
"""Put before one in four trained phrasings."""

CLOSINGS = (
    *(" in the image", " in this image", " on the image", " of the image", " here", ", please", " please", " now"),
    *(" that you see", " there", " in front of you", " for me", " to you", ", do you know", ", can you tell me"),
)
"""Put after one in four."""

FILLERS = (
    *("really", "exactly", "actually", "just", "perhaps", "kindly", "friend", "today", "again", "quickly", "simply"),
    *("truly", "sir", "honestly", "by chance", "indeed", "for sure", "certainly", "computer", "my dear", "little"),
    *("single", "only", "even", "very", "as well", "in your opinion", "at all", "if possible", "for example", "next"),
    *("finally", "first", "we wonder", "let us see", "somehow", "quite", "maybe", "everyone", "old", "nice", "given"),
)
"""Inserted into one trained phrasing in six, so that the model ignores what it does not know."""

SYNONYMS = {
    "image": ("image", "picture", "photo", "drawing"),
    "object": ("object", "thing", "figure", "item"),
    "color": ("color", "colour"),
    "colored": ("colored", "coloured"),
    "gray": ("gray", "grey"),
    "what is": ("what is", "what's"),
}
"""Texts of the same meaning, substituted at random in trained and held-back phrasings alike."""

_ENDINGS, _ENDING_WEIGHTS = (
    ("?", "", "??", " ?", ".", "?!", "???", "!"),
    (0.55, 0.25, 0.06, 0.04, 0.04, 0.02, 0.02, 0.02),
)


def rephrase(
    known: KnownAttributes, random: np.random.Generator, *, later: bool = False, phrasings: Phrasings = TRAINED
) -> Question | None:
    """A question drawn from `phrasings` with its answer, lower case and with a question mark.

    `later` draws from the phrasings of later turns too. None if shape and colour are both unknown. Openings and
    closings are added to TRAINED phrasings alone.
    """
    intents = [intent for intent in INTENTS if _answerable(intent, known)]
    if not intents:
        return None
    weights = np.array([0.4 if intent == "is_both" else 1.0 for intent in intents])
    intent = intents[random.choice(len(intents), p=weights / weights.sum())]
    source = phrasings.later if later and phrasings.later and random.random() < 0.5 else phrasings
    templates = [t for t in getattr(source, intent) if _fillable(t, intent, known)]
    template = templates[random.integers(len(templates))]
    if phrasings is TRAINED:
        template = _decorate(template, random)
    return fill(template, intent, known, random)


def fill(template: str, intent: str, known: KnownAttributes, random: np.random.Generator) -> Question:
    """The question of a template of this intent, with a question mark, and its answer."""
    asked = known._asdict()
    if intent in asked:
        answer = asked[intent]
    elif random.random() < 0.5:
        answer = "yes"
    else:
        answer = "no"
        names = {"is_shape": ("shape",), "is_colour": ("colour",), "is_both": ("shape", "colour")}[intent]
        name = names[random.integers(len(names))]
        others = [value for value in (SHAPES if name == "shape" else COLOURS) if value != asked[name]]
        asked[name] = others[random.integers(len(others))]
    text = template.format(**asked)
    for word, synonyms in SYNONYMS.items():
        if f" {word} " in f" {text} ":
            chosen = synonyms[random.integers(len(synonyms))]
            text = f" {text} ".replace(f" {word} ", f" {chosen} ")[1:-1]
    return Question(f"{text}?", answer)


def vary_surface(text: str, random: np.random.Generator) -> str:
    """The same question as people type it: other case, other or no punctuation at the end, doubled spaces."""
    text = text.rstrip("?!. ") + random.choice(_ENDINGS, p=_ENDING_WEIGHTS)
    case = random.random()
    if case < 0.4:
        text = text[:1].upper() + text[1:]
    elif case < 0.55:
        text = text.upper()
    elif case < 0.6:
        text = text.title()
    if random.random() < 0.15:
        words = text.split(" ")
        place = int(random.integers(len(words)))
        text = " ".join([*words[:place], "", *words[place:]])
    return text


def trained_examples() -> list[Question]:
    """Every trained phrasing once, each with some shape and colour: what a tokenizer is trained on."""
    random = np.random.default_rng(0)
    values = [KnownAttributes(shape, colour) for shape in SHAPES for colour in COLOURS]
    sources = [TRAINED, TRAINED.later] if TRAINED.later else [TRAINED]
    return [
        fill(_decorate(template, random), intent, values[i % len(values)], random)
        for source in sources
        for intent, templates in source.by_intent().items()
        for i, template in enumerate(templates)
    ]


def _answerable(intent: str, known: KnownAttributes) -> bool:
    needs = {"shape": ("shape",), "colour": ("colour",), "is_shape": ("shape",), "is_colour": ("colour",)}
    return all(getattr(known, name) is not None for name in needs.get(intent, ("shape", "colour")))


def _fillable(template: str, intent: str, known: KnownAttributes) -> bool:
    return all(f"{{{name}}}" not in template or getattr(known, name) is not None for name in known._fields)


def _decorate(template: str, random: np.random.Generator) -> str:
    """The template with an opening, a filler and a closing, or some of them; the image is not mentioned twice."""
    opening = OPENINGS[random.integers(len(OPENINGS))] if random.random() < 0.25 else ""
    closing = CLOSINGS[random.integers(len(CLOSINGS))] if random.random() < 0.25 else ""
    if "image" in template and "image" in opening:
        opening = ""
    if "image" in opening + template and "image" in closing:
        closing = ""
    words = template.split(" ")
    if random.random() < 1 / 6:
        words.insert(int(random.integers(len(words) + 1)), FILLERS[random.integers(len(FILLERS))])
    return f"{opening}{' '.join(words)}{closing}"
