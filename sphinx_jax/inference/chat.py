"""A conversation over several turns, about a picture or none, whose cache is kept between the turns.

`Chat` is the conversation; below it, having one on a terminal, or through a pipe with one question a line.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from sphinx_jax.data.conversation import Conversation
from sphinx_jax.errors import UserError
from sphinx_jax.inference.engine import Engine
from sphinx_jax.inference.requests import PreparedImage, Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.inference.serving import Session


@dataclasses.dataclass(frozen=True)
class Turn:
    question: str
    answer: str


class Chat:
    """Asks one question after another. The picture is encoded once, and a turn reads only what is new."""

    def __init__(
        self,
        engine: Engine,
        picture: PreparedImage | None = None,
        *,
        sampling: SamplingParams,
        max_new_tokens: int = 512,
        seed: int = 0,
        stop: tuple[str, ...] = (),
    ):
        self.turns: list[Turn] = []
        self.picture = picture
        self._engine = engine
        self._max_new_tokens, self._sampling, self._seed, self._stop = max_new_tokens, sampling, seed, stop
        # Padding of the last piece of a prompt may reach past the context.
        self._session = Session(engine, engine.max_model_len + engine.prefill_tokens)

    def reset(self, picture: PreparedImage | None) -> None:
        """Forget the turns and look at another picture, or at none."""
        self.turns, self.picture = [], picture

    def stream(self, question: str) -> Iterator[str]:
        """The answer, piece by piece. Ended early, by close() or Ctrl-C, what was said until then is the answer.

        Raises UserError if the conversation no longer fits the context; the turns so far stay.
        """
        earlier = ((turn.question, turn.answer) for turn in self.turns)
        conversation = Conversation.from_pairs([*earlier, (question, None)])
        request = Request(
            conversation.prompt_tokens(self._engine.tokenizer), self.picture, self._max_new_tokens, self._seed
        )
        stops = (conversation.template.response_end_signal, *self._stop)
        said = []
        pieces = self._session.stream(request, self._sampling, stops)
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if said:
                self.turns.append(Turn(question, "".join(said)))
            raise
        self.turns.append(Turn(question, "".join(said)))

    def ask(self, question: str) -> str:
        """The whole answer."""
        return "".join(self.stream(question))


HELP = """\
/image FILE   look at another picture (without FILE: at none) and begin afresh
/reset        forget the turns, keep the picture
/save FILE    write the conversation to a JSON file that train.py reads
/help         show this
/quit         leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat_on_terminal(chat: Chat, image: Path | None, look: Callable[[Path], PreparedImage]) -> None:
    """Ask and answer until /quit or the end of input. What goes wrong is told, and the chat goes on."""
    # Importing it gives `input` arrow keys and a history.
    import readline  # noqa: F401

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"{image or 'no picture'}; /help shows the commands", style="dim")
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
                image = _obey(chat, command, argument.strip(), image, look, console)
            elif line:
                for piece in chat.stream(line):
                    console.print(piece, end="")
                console.print()
        except KeyboardInterrupt:
            console.print("\n(stopped)", style="dim")
        except UserError as error:
            console.print(str(error), style="red")


def _obey(
    chat: Chat, command: str, argument: str, image: Path | None, look: Callable[[Path], PreparedImage], console: Console
) -> Path | None:
    """Do what a command says; the path of the picture from then on."""
    match command:
        case "/image":
            image = Path(argument).expanduser() if argument else None
            chat.reset(look(image) if image else None)
            console.print(f"{image or 'no picture'}, from the beginning", style="dim")
        case "/reset":
            chat.reset(chat.picture)
            console.print("from the beginning", style="dim")
        case "/save":
            if not argument:
                raise UserError("/save needs the name of a file")
            save(chat, image, Path(argument).expanduser())
            console.print(f"saved to {argument}", style="dim")
        case "/help":
            console.print(HELP)
        case _:
            raise UserError(f"unknown command {command}; /help shows the known ones")
    return image


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
    """Answer each line of standard input with plain text, one conversation; empty lines are passed over."""
    for line in sys.stdin:
        if line.strip():
            for piece in chat.stream(line.strip()):
                print(piece, end="", flush=True)
            print(flush=True)
