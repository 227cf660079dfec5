"""A conversation as text, as token ids, and as labels for training.

    system prompt

    ### Human: question
    ### Assistant: answer
    ### Human: ...

The loss covers the assistant's answers and the stop signal after each; all other tokens are context.
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
"""The label of a token without loss: the id of <unk>, which byte fallback never produces."""

PADDING = 0
"""The token id after the end of a conversation."""


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns are joined: the system text and its end, then each turn as " ROLE: text" and the end of its role.

    Every border between turns is followed by one space.
    """

    system: str
    system_end: str
    human: str
    assistant: str
    human_end: str
    assistant_end: str

    @property
    def response_end_signal(self) -> str:
        """The text that ends the assistant's turn; generation stops there."""
        return self.assistant_end


DEFAULT_TEMPLATE = Template(
    system="A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.",
    system_end="\n\n###",
    human="Human",
    assistant="Assistant",
    human_end="\n###",
    assistant_end="\n###",
)
"""The template that SPHINX-MoE was trained with."""


class Turn(NamedTuple):
    role: Literal["human", "assistant"]
    text: str


class Segment(NamedTuple):
    """A part of a conversation's text, and whether its tokens have loss."""

    text: str
    has_loss: bool


class Example(NamedTuple):
    """One conversation for training. `labels[i]` is `tokens[i]` where it has loss, else IGNORE_INDEX: not shifted."""

    tokens: Int[np.ndarray, "length"]
    labels: Int[np.ndarray, "length"]


_ROLES: dict[str, Literal["human", "assistant"]] = {"human": "human", "gpt": "assistant", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns in order. Dropped from each text: `<image>` marks, and then whitespace at both ends.

    The template brings its own whitespace, and the image has its place after BOS.
    """

    turns: tuple[Turn, ...]
    template: Template = DEFAULT_TEMPLATE
    system: str | None = None
    """The system text, in place of the template's own."""

    def __post_init__(self) -> None:
        turns = tuple(Turn(role, text.replace("<image>", "").strip()) for role, text in self.turns)
        object.__setattr__(self, "turns", turns)

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[tuple[str, str | None]], template: Template = DEFAULT_TEMPLATE
    ) -> "Conversation":
        """From (question, answer) pairs; None is an answer to be generated."""
        turns = []
        for question, answer in pairs:
            turns.append(Turn("human", question))
            if answer is not None:
                turns.append(Turn("assistant", answer))
        return cls(tuple(turns), template)

    @classmethod
    def from_record(cls, source: Any, where: str, template: Template = DEFAULT_TEMPLATE) -> "Conversation":
        """From a LLaVA-style list of {"from": "human" | "gpt", "value": ...}.

        Raises BadRecord, which begins with `where`, if it is not such a list, or empty; UserError on an unknown role.
        """
        if not isinstance(source, list) or not source:
            problem = f'{where}: "conversations" must be a list of at least one turn, got {reprlib.repr(source)}'
            raise BadRecord(where, problem)
        return cls(tuple(_read_turn(turn, where, i) for i, turn in enumerate(source)), template)

    def segments(self) -> list[Segment]:
        """The text split where loss begins and ends: segments without and with loss alternate."""
        t = self.template
        segments, context = [], (t.system if self.system is None else self.system) + t.system_end
        for role, text in self.turns:
            if role == "human":
                context += f" {t.human}: {text}{t.human_end}"
            else:
                segments += [Segment(f"{context} {t.assistant}:", False), Segment(f" {text}{t.assistant_end}", True)]
                context = ""
        return [*segments, Segment(context, False)] if context else segments

    def text(self) -> str:
        """The whole conversation, as in training."""
        return "".join(segment.text for segment in self.segments())

    def prompt(self, prefix: str = "") -> str:
        """The conversation up to the assistant's next answer, which begins with `prefix`."""
        return f"{self.text()} {self.template.assistant}:{prefix}"

    def check_forged_turns(self) -> None:
        """Raises UserError if a turn or the system text holds the mark that ends turns, after which others follow.

        The original takes such text as it is, and so does this class.
        """
        marks = {end for end in (self.template.human_end, self.template.assistant_end) if end}
        for text in (self.system or "", *(turn.text for turn in self.turns)):
            if found := next((mark for mark in marks if mark in text), None):
                raise UserError(
                    f"the text {text!r:.60} holds {found!r}, which ends a turn of the conversation; leave it out"
                )

    def prompt_tokens(self, tokenizer: Tokenizer, prefix: str = "") -> list[int]:
        """Token ids of `prompt(prefix)`, with BOS; of the tokenizer's chat template where it has one.

        The text is tokenised as a whole: `prefix` has the tokens that it has in a conversation, and brings the space
        that it begins with, as in " The answer is".
        """
        if tokenizer.chat_template is not None:
            roles = {"human": "user", "assistant": "assistant"}
            messages = [] if self.system is None else [{"role": "system", "content": self.system}]
            messages += [{"role": roles[role], "content": text} for role, text in self.turns]
            return tokenizer.chat_tokens(messages, prefix)
        return tokenizer.encode(self.prompt(prefix), bos=True, eos=False)

    def example(self, tokenizer: Tokenizer) -> Example:
        """Tokens from BOS to EOS, and their labels (EOS has no loss).

        Segments are tokenised one by one. This gives the ids of the whole text, because no piece crosses the one space
        that every segment begins with. The loss mask then follows from the role, even where a human turn ends with the
        tokens of the answer (the original searches for the answer's tokens, and in that case labels the human's).
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
    location = f"{where}, turn {number}"
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRecord(where, f'{location}: needs "from" and "value", got {reprlib.repr(turn)}')
    role = _ROLES.get(str(turn["from"]).lower())
    if role is None:
        # Not one bad record: the whole file uses another convention.
        raise UserError(f'{location}: is from {reprlib.repr(turn["from"])}; use "human" or "gpt"')
    value = turn["value"]
    # Answers that are counts are often written as JSON numbers.
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise BadRecord(where, f'{location}: "value" must be text, got {reprlib.repr(value)}')
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(where, f'{location}: "value" holds half a surrogate pair at character {error.start}') from error
    return Turn(role, text)


def fit(example: Example, max_length: int, num_image_tokens: int, where: str) -> Example:
    """`example` truncated or padded to the text positions that `num_image_tokens` leave of `max_length`.

    Raises BadRecord, which begins with `where`, if no token with loss is left; UserError if no text has room.
    """
    length = max_length - num_image_tokens
    if length < 1:
        raise UserError(
            f"{where}: the image takes {num_image_tokens} positions and the limit is {max_length}, which leaves no "
            f"room for text; raise the maximum length above {num_image_tokens}"
        )
    tokens, labels = (array[:length] for array in example)
    if not (labels != IGNORE_INDEX).any():
        first = (example.labels != IGNORE_INDEX).argmax()
        reason = (
            f"the first answer begins at position {first}, the limit leaves {length} for text; raise the maximum length"
            if (example.labels != IGNORE_INDEX).any()
            else "it has no answer; add a turn from the assistant"
        )
        raise BadRecord(where, f"{where}: no token with loss is left: {reason}")
    missing = length - len(tokens)
    return Example(
        np.pad(tokens, (0, missing), constant_values=PADDING),
        np.pad(labels, (0, missing), constant_values=IGNORE_INDEX),
    )
