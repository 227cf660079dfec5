"""A conversation as text, as token ids, and as what the model is to learn of it.

    system prompt

    ### Human: question
    ### Assistant: answer
    ### Human: ...

The assistant's words and the stop signal after them are learned; everything else is only read.
"""

import dataclasses
import reprlib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from sphinx_jax.data.skipped_records import BadRecord
from sphinx_jax.data.tokenizer import Tokenizer
from sphinx_jax.errors import UserError

IGNORE_INDEX = 0
"""The label of a token that is not learned: the id of <unk>, which byte fallback never produces."""

PADDING = 0
"""The token id after the end of a conversation."""


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are joined. `beginning` stands before the first turn, an `end` behind each.

    A turn is " ROLE: text" and its end; every border between turns is followed by one space.
    """

    beginning: str
    human: str
    assistant: str
    human_end: str
    assistant_end: str

    @property
    def response_end_signal(self) -> str:
        """What the assistant says to end its turn; generation stops there."""
        return self.assistant_end


_ASSISTANT = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)
_LLAVA = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)


def _hashes(system: str) -> Template:
    return Template(system + "\n\n###", "Human", "Assistant", "\n###", "\n###")


def _vicuna(system: str, assistant: str = "ASSISTANT") -> Template:
    return Template(system + " ", "USER", assistant, " ", "</s>")


DEFAULT_TEMPLATE = _hashes(_ASSISTANT.format("human", "human"))

TEMPLATES: dict[str, Template] = {
    "default": DEFAULT_TEMPLATE,
    "simple": DEFAULT_TEMPLATE,
    "v1": DEFAULT_TEMPLATE,
    "multimodal": _hashes(_LLAVA),
    "llava_v1": _vicuna(_LLAVA),
    "bair_v1": _vicuna("BEGINNING OF CONVERSATION:", "GPT"),
    "vicuna_v1_1": _vicuna(_ASSISTANT.format("user", "user")),
}
"""The templates of the original, by name. SPHINX-MoE uses "default"."""


class Turn(NamedTuple):
    role: Literal["human", "assistant"]
    text: str


class Segment(NamedTuple):
    """A stretch of a conversation's text, and whether the model is to learn to say it."""

    text: str
    has_loss: bool


class Example(NamedTuple):
    """One conversation for training. `labels[i]` is `tokens[i]` where learned, else NOT_LEARNED: not shifted."""

    tokens: Int[np.ndarray, "length"]
    labels: Int[np.ndarray, "length"]


_ROLES: dict[str, Literal["human", "assistant"]] = {"human": "human", "gpt": "assistant", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns in order. Whitespace around a turn's text is dropped: the template brings its own."""

    turns: tuple[Turn, ...]
    template: Template = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(Turn(role, text.strip()) for role, text in self.turns))

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[tuple[str, str | None]], template: Template = DEFAULT_TEMPLATE
    ) -> "Conversation":
        """From (question, answer) pairs; None is an answer still to be given."""
        turns = [turn for question, answer in pairs for turn in (("human", question), ("assistant", answer))]
        return cls(tuple(Turn(role, text) for role, text in turns if text is not None), template)

    @classmethod
    def from_record(cls, source: Any, where: str, template: Template = DEFAULT_TEMPLATE) -> "Conversation":
        """From a LLaVA-style list of {"from": "human" | "gpt", "value": ...}; `<image>` marks are dropped.

        Raises BadRecord, which begins with `where`, if it is no such list, or empty; UserError on an unknown role.
        """
        if not isinstance(source, list) or not source:
            problem = f'{where}: "conversations" must be a list of at least one turn, got {reprlib.repr(source)}'
            raise BadRecord(where, problem)
        return cls(tuple(_read_turn(turn, where, i) for i, turn in enumerate(source)), template)

    def segments(self) -> list[Segment]:
        """The text cut where learning begins and ends; learned and unlearned segments alternate."""
        t = self.template
        segments, read = [], t.beginning
        for role, text in self.turns:
            if role == "human":
                read += f" {t.human}: {text}{t.human_end}"
            else:
                segments += [Segment(f"{read} {t.assistant}:", False), Segment(f" {text}{t.assistant_end}", True)]
                read = ""
        return [*segments, Segment(read, False)] if read else segments

    def text(self) -> str:
        """The whole conversation, as it is trained on."""
        return "".join(segment.text for segment in self.segments())

    def prompt(self) -> str:
        """The conversation up to where the assistant is to speak."""
        return f"{self.text()} {self.template.assistant}:"

    def prompt_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of `prompt()`, with BOS."""
        return tokenizer.encode(self.prompt(), bos=True, eos=False)

    def example(self, tokenizer: Tokenizer) -> Example:
        """Tokens from BOS to EOS, and labels that say which of them are learned (EOS itself is not).

        Segments are tokenised one by one, which gives the ids of the whole text because no piece runs over
        the one space that every segment begins with. What is learned then follows from who speaks, even where
        a human turn ends with the words of the answer (the original searches for the answer's words, and in
        that case labels the human's).
        """
        tokens, labels = [], []
        for i, (text, has_loss) in enumerate(self.segments()):
            ids = tokenizer.encode_segment(text) if i else tokenizer.encode(text, bos=True, eos=False)
            tokens += ids
            labels += ids if has_loss else [IGNORE_INDEX] * len(ids)
        tokens.append(tokenizer.eos_id)
        labels.append(IGNORE_INDEX)
        return Example(np.asarray(tokens, np.int32), np.asarray(labels, np.int32))


def _read_turn(turn: Any, where: str, number: int) -> Turn:
    place = f"{where}, turn {number}"
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRecord(where, f'{place}: needs "from" and "value", got {reprlib.repr(turn)}')
    role = _ROLES.get(str(turn["from"]).lower())
    if role is None:
        # Not one bad record: a file that is written otherwise throughout.
        raise UserError(f'{place}: is from {reprlib.repr(turn["from"])}; use "human" or "gpt"')
    value = turn["value"]
    # Answers that are counts are often written as JSON numbers.
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise BadRecord(where, f'{place}: "value" must be text, got {reprlib.repr(value)}')
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(where, f'{place}: "value" holds half a surrogate pair at character {error.start}') from error
    return Turn(role, text.replace("<image>", ""))


def fit(example: Example, max_length: int, num_image_tokens: int, where: str) -> Example:
    """`example` cut or padded to the text positions that `num_image_tokens` leave of `max_length`.

    Raises BadRecord, which begins with `where`, if nothing to learn is left; UserError if no text has room.
    """
    length = max_length - num_image_tokens
    if length < 1:
        raise UserError(
            f"{where}: the picture takes {num_image_tokens} positions and the limit is {max_length}, which leaves no room "
            f"for text; raise the maximum length above {num_image_tokens}"
        )
    tokens, labels = (array[:length] for array in example)
    if not (labels != IGNORE_INDEX).any():
        first = (example.labels != IGNORE_INDEX).argmax()
        reason = (
            f"the first answer begins at position {first}, the limit leaves {length} for text; raise the maximum length"
            if (example.labels != IGNORE_INDEX).any()
            else "it has no answer; add a turn from the assistant"
        )
        raise BadRecord(where, f"{where}: nothing left to learn: {reason}")
    missing = length - len(tokens)
    return Example(
        np.pad(tokens, (0, missing), constant_values=PADDING),
        np.pad(labels, (0, missing), constant_values=IGNORE_INDEX),
    )
