"""From the messages of a chat to what the model reads: a system text, turns, one image, and how the answer begins."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sphinx_jax.data.conversation import Conversation, Turn
from sphinx_jax.data.images import data_url_bytes, is_data_url, load_image
from sphinx_jax.errors import UserError
from sphinx_jax.inference.requests import PreparedImage
from sphinx_jax.server.api_errors import ApiError
from sphinx_jax.server.protocol import ImagePart, Message

MAX_IMAGE_PIXELS = 64 << 20
"""Pixels of an image that are decoded: three bytes each."""


class ChatPrompt(NamedTuple):
    """What a chat asks: the conversation, its image, and the beginning of the answer."""

    conversation: Conversation
    image: PreparedImage | None
    prefix: str


class ImageReader:
    """Reads the image of a message. URLs of other hosts are never fetched: only data: URLs, and files below `root`."""

    def __init__(self, prepare: Callable[[Image.Image], PreparedImage], root: Path | None):
        self._prepare, self._root = prepare, root and root.resolve()

    def read(self, url: str, param: str) -> PreparedImage:
        """The image at `url`, of the field `param`. Raises ApiError if it is not served or cannot be decoded."""
        try:
            return self._prepare(load_image(self._data(url, param), "the image", max_pixels=MAX_IMAGE_PIXELS))
        except UserError as error:
            raise ApiError(str(error), param=param, code="invalid_image") from error

    def _data(self, url: str, param: str) -> bytes | Path:
        if is_data_url(url):
            return data_url_bytes(url)
        if url[:5].lower() == "file:" and self._root is not None:
            return self._file(url.partition(":")[2], self._root, param)
        files = "" if self._root is None else ", or file: URLs below --allowed-media-root"
        raise ApiError(
            f"the image must be a data: URL (data:image/png;base64,...){files}; addresses of other hosts are not read",
            param=param,
            code="invalid_image",
        )

    def _file(self, name: str, root: Path, param: str) -> Path:
        """A file below `root`, links followed before that is checked. The same error whether it exists or not."""
        try:
            path = Path("/" + name.lstrip("/")).resolve()
            if path.is_relative_to(root) and path.is_file():
                return path
        except (OSError, ValueError, RuntimeError):
            pass
        raise ApiError("the image is no file below --allowed-media-root", param=param, code="invalid_image")


def read_chat(messages: Sequence[Message], read_image: Callable[[str, str], PreparedImage]) -> ChatPrompt:
    """The conversation of `messages`. `read_image(url, param)` makes an image of a URL.

    System and developer messages become the system text; turns of one role in a row are joined; a last message of the
    assistant is the beginning of the answer. Raises ApiError on what this model cannot read.
    """
    system, turns, images = [], [], {}
    for i, message in enumerate(messages):
        text, urls = _parts(message)
        for url, param in ((url, f"messages[{i}].content") for url in urls):
            if message.role != "user":
                raise ApiError(f"an image belongs to a message of the user, not of the {message.role}", param=param)
            images.setdefault(url, param)
        if message.role in ("system", "developer"):
            system.append(text)
        else:
            _add_turn(turns, Turn("human" if message.role == "user" else "assistant", text))
    prefix = turns.pop().text.strip() if turns and turns[-1].role == "assistant" else ""
    if not turns:
        raise ApiError("messages need one of the user", param="messages")
    conversation = Conversation(tuple(turns), system="\n".join(system) if system else None)
    return ChatPrompt(conversation, _one_image(images, read_image), f" {prefix}" if prefix else "")


def _parts(message: Message) -> tuple[str, list[str]]:
    """The text of a message, its parts joined by line breaks, and the URLs of its images."""
    if message.content is None or isinstance(message.content, str):
        return message.content or "", []
    texts = [part.text for part in message.content if not isinstance(part, ImagePart)]
    return "\n".join(texts), [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def _add_turn(turns: list[Turn], turn: Turn) -> None:
    if turns and turns[-1].role == turn.role:
        turns[-1] = Turn(turn.role, f"{turns[-1].text}\n{turn.text}")
    else:
        turns.append(turn)


def _one_image(urls: dict[str, str], read_image: Callable[[str, str], PreparedImage]) -> PreparedImage | None:
    """The image of the conversation: URLs whose pixels are the same are one."""
    images = {}
    for url, param in urls.items():
        image = read_image(url, param)
        images[image.digest] = image
        if len(images) > 1:
            raise ApiError("this model looks at one image in a conversation; leave the others out", param=param)
    return next(iter(images.values()), None)
