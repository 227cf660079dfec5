"""Training records in the chat format of OpenAI and Hugging Face, and rows of a Hugging Face imagefolder.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

Roles are system, developer (the same), user and assistant. A content is a text, or a list of parts: "text",
"image_url" as OpenAI has it, or "image" with "image", "path" or "url". An image part without any of these has its
place held by the record's own "image" or "images", as in TRL. One conversation has one image.

A row of `metadata.jsonl` names its image by "file_name". It holds "messages", or "question" and "answer", or a "text",
which answers the `prompt` of the data.yaml.
"""

import reprlib
from typing import Any, Literal

from sphinx_jax.data.conversation import Conversation, Turn
from sphinx_jax.data.skipped_records import BadRecord
from sphinx_jax.errors import UserError

_ROLES: dict[str, Literal["system", "human", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "human",
    "assistant": "assistant",
}


def read_messages(messages: Any, where: str) -> tuple[Conversation, list[str]]:
    """The conversation, and the images that its parts name, each once.

    System texts in a row, and turns of one role in a row, are joined by line breaks, as the server does. Raises
    BadRecord, which begins with `where`, on a malformed list; UserError on an unknown role.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRecord(where, f'{where}: "messages" must be a list of at least one message, got {_shown(messages)}')
    system: list[str] = []
    turns: list[Turn] = []
    images: dict[str, None] = {}
    for i, message in enumerate(messages):
        location = f"{where}, message {i}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRecord(where, f'{location}: needs "role" and "content", got {_shown(message)}')
        role = _ROLES.get(str(message["role"]))
        if role is None:
            # Not one bad record: the whole file uses another convention.
            raise UserError(f'{location}: has the role {_shown(message["role"])}; use "system", "user" or "assistant"')
        text, named = _content(message["content"], location, where)
        images |= dict.fromkeys(named)
        if role == "system":
            system.append(text)
        elif turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n{text}")
        else:
            turns.append(Turn(role, text))
    return Conversation(tuple(turns), system="\n".join(system) if system else None), list(images)


def read_image_row(record: dict[str, Any], prompt: str | None, where: str) -> Conversation:
    """The conversation of a row without messages: its question and answer, or its text as the answer to `prompt`.

    Raises BadRecord if it has neither; UserError if its text needs a prompt.
    """
    if "question" in record and "answer" in record:
        pair = record["question"], record["answer"]
    elif "text" in record:
        if prompt is None:
            raise UserError(f"{where}: has a text and no question; give the entry of the data.yaml a prompt")
        pair = prompt, record["text"]
    else:
        problem = 'needs "messages", "conversations", "question" and "answer", or "text"'
        raise BadRecord(where, f"{where}: {problem}, got {_shown(record)}")
    question, answer = (_text(value, where, where) for value in pair)
    return Conversation.from_pairs([(question, answer)])


def image_of(record: dict[str, Any], named: list[str], where: str) -> Any:
    """The one image of a record: named by a part, by "image" or "images", or by "file_name".

    Raises BadRecord if there are several.
    """
    images = record.get("images")
    if images is not None and not isinstance(images, list):
        raise BadRecord(where, f'{where}: "images" must be a list, got {_shown(images)}')
    own = [record[key] for key in ("image", "file_name") if record.get(key) is not None]
    found = [*named, *(images or []), *own]
    if any(image != found[0] for image in found[1:]):
        raise BadRecord(where, f"{where}: has {len(found)} images, and the model looks at one in a conversation")
    return found[0] if found else None


def _content(content: Any, location: str, where: str) -> tuple[str, list[str]]:
    """The text of a message, its parts joined by line breaks, and the images that it names."""
    if not isinstance(content, list):
        return _text(content, location, where), []
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), location, where))
        elif kind == "image_url":
            url = part.get("image_url")
            images.append(_name(url.get("url") if isinstance(url, dict) else url, location, where))
        elif kind == "image":
            names = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
            images += [_name(name, location, where) for name in names]
        else:
            raise BadRecord(
                where, f'{location}: a part must be of type "text", "image_url" or "image", got {_shown(part)}'
            )
    return "\n".join(texts), images


def _name(value: Any, location: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise BadRecord(where, f"{location}: an image must be the path of a file or a data: URL, got {_shown(value)}")
    return value.removeprefix("file://")


def _text(value: Any, location: str, where: str) -> str:
    # Answers that are counts are often written as JSON numbers.
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise BadRecord(where, f"{location}: must be text, got {_shown(value)}")
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(where, f"{location}: holds half a surrogate pair at character {error.start}") from error
    return str(value)


def _shown(value: Any) -> str:
    return reprlib.repr(value)
