"""A conversation over several turns, about an image or none, whose KV cache is kept between the turns.

`Chat` is the conversation; below it, having one on a terminal, or through a pipe with one question a line.
"""

import contextlib
import dataclasses
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from sphinx_jax.data.conversation import Conversation
from sphinx_jax.errors import UserError
from sphinx_jax.inference import generate
from sphinx_jax.inference.bucketing import bucket
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.programs import StateShape
from sphinx_jax.inference.requests import PreparedImage, Request
from sphinx_jax.inference.sampling import GREEDY, SamplingParams
from sphinx_jax.inference.scheduler import Scheduler


@dataclasses.dataclass(frozen=True)
class Turn:
    question: str
    answer: str


class Chat:
    """Asks one question after another. The image is encoded once, and a turn prefills only what is new."""

    def __init__(
        self,
        engine: Engine,
        image: PreparedImage | None = None,
        params: SamplingParams = GREEDY,
        adapter: str | None = None,
    ):
        engine.rank_masks([adapter])  # raises UserError on an unknown one
        self.turns: list[Turn] = []
        self.image = image
        self._engine, self._params, self._adapter = engine, params, adapter
        # The padding of a prompt's last chunk may reach past the model's length.
        cache_len = bucket(engine.max_model_len + engine.prefill_tokens)
        self._scheduler = Scheduler(engine, StateShape(engine.round_up(1), cache_len))

    def reset(self, image: PreparedImage | None) -> None:
        """Forget the turns and ask about another image, or none."""
        self.turns, self.image = [], image

    def stream(self, question: str) -> Iterator[str]:
        """The answer as its text becomes certain. Closed early, or interrupted, the text so far is the answer.

        Raises UserError if the conversation no longer fits; the turns so far stay.
        """
        earlier = ((turn.question, turn.answer) for turn in self.turns)
        conversation = Conversation.from_pairs([*earlier, (question, None)])
        if self._engine.refuses_forged_turns:
            conversation.check_forged_turns()
        request = Request(
            conversation.prompt_tokens(self._engine.tokenizer),
            self.image,
            self._params,
            self._engine.tokenizer.chat_template is not None,
            adapter=self._adapter,
        )
        parts = []
        try:
            for text in generate.stream(self._scheduler, request):
                parts.append(text)
                yield text
        except (GeneratorExit, KeyboardInterrupt):
            if parts:
                self.turns.append(Turn(question, "".join(parts)))
            raise
        self.turns.append(Turn(question, "".join(parts)))

    def ask(self, question: str) -> str:
        """The whole answer."""
        return "".join(self.stream(question))


HELP = """\
/image FILE   ask about another image (without FILE: none) and start over
/reset        forget the turns, keep the image
/save FILE    write the conversation to a JSON file that train.py reads
/help         show this
/quit         leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat_on_terminal(chat: Chat, image: Path | None, load_image: Callable[[Path], PreparedImage]) -> None:
    """Ask and answer until /quit or the end of input. Errors are printed, and the chat continues."""
    # Importing it gives `input` arrow keys and a history.
    import readline  # noqa: F401

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print(f"{image or 'no image'}; /help shows the commands", style="dim")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("(/quit or Ctrl-D leaves)", style="dim")
            continue
        try:
            if line.startswith("/"):
                command, _, argument = line.partition(" ")
                if command == "/quit":
                    return
                image = _obey(chat, command, argument.strip(), image, load_image, console)
            elif line:
                for text in chat.stream(line):
                    console.print(text, end="")
                console.print()
        except KeyboardInterrupt:
            console.print("\n(stopped)", style="dim")
        except UserError as error:
            console.print(str(error), style="red")


def _obey(
    chat: Chat,
    command: str,
    argument: str,
    image: Path | None,
    load_image: Callable[[Path], PreparedImage],
    console: Console,
) -> Path | None:
    """Do what a command says; the path of the image from then on."""
    match command:
        case "/image":
            image = typed_path(argument) if argument else None
            chat.reset(load_image(image) if image else None)
            console.print(f"{image or 'no image'}, a new conversation", style="dim")
        case "/reset":
            chat.reset(chat.image)
            console.print("a new conversation", style="dim")
        case "/save":
            if not argument:
                raise UserError("/save needs the name of a file")
            save(chat, image, typed_path(argument))
            console.print(f"saved to {argument}", style="dim")
        case "/help":
            console.print(HELP)
        case _:
            raise UserError(f"unknown command {command}; /help shows the known ones")
    return image


def typed_path(text: str) -> Path:
    """A path as terminals paste it: in quotes, with escaped blanks, or beginning with ~.

    Raises UserError on one that cannot be.
    """
    try:
        if not Path(text).expanduser().exists():
            with contextlib.suppress(ValueError):
                # A blank that is not escaped belongs to the name, as nothing follows it.
                text = " ".join(shlex.split(text)) or text
        path = Path(text).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{text!r:.100} is not the path of a file ({reason})") from error
    return path


def save(chat: Chat, image: Path | None, file: Path) -> None:
    """Write the turns as one record of the training format. Raises UserError if there are none or `file` exists."""
    if not chat.turns:
        raise UserError("there is nothing to save yet: ask something first")
    turns = [
        {"from": speaker, "value": text}
        for turn in chat.turns
        for speaker, text in (("human", turn.question), ("gpt", turn.answer))
    ]
    record = {"image": str(image.absolute())} if image else {}
    try:
        with file.open("x", encoding="utf-8") as out:
            json.dump([record | {"conversations": turns}], out, ensure_ascii=False, indent=2)
    except FileExistsError as error:
        raise UserError(f"{file} exists already; choose another name") from error
    except OSError as error:
        raise UserError(f"{file}: cannot write the file ({error.strerror})") from error


def chat_in_pipe(chat: Chat) -> None:
    """Answer each line of standard input with plain text, one conversation; empty lines are passed over.

    A line that cannot be answered is reported on standard error, and the next one is answered.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the output's encoding lacks is written as an escape.
        sys.stdout.reconfigure(errors="backslashreplace")
    stdin = getattr(sys.stdin, "buffer", None)
    lines = sys.stdin if stdin is None else stdin
    for number, line in enumerate(lines, start=1):
        try:
            question = line if isinstance(line, str) else line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not question.strip():
                continue
            for text in chat.stream(question.strip()):
                print(text, end="", flush=True)
            print(flush=True)
        except (UserError, UnicodeDecodeError) as error:
            reason = error if isinstance(error, UserError) else f"not UTF-8 ({error.reason})"
            print(f"error: line {number}: {reason}", file=sys.stderr)
