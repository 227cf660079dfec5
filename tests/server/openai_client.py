"""What a user of openai-python does. Each of its major versions runs this file, which prints what it got as JSON.

`openai_client.py URL KEY contract` reads {"image", "question", "prompt"} from standard input. `openai_client.py URL KEY
stream` waits for a line there, prints one when a long stream has begun, and then how it ended.
"""

import asyncio
import json
import sys
from typing import Any

import openai

LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "model": "nano",
    "temperature": 2,
    "top_p": 1,
    "seed": 1,
    "extra_body": {"ignore_eos": True},
}
"""Answers as long as the context."""


def contract(client: openai.OpenAI, url: str, asked: dict[str, str]) -> dict[str, Any]:
    """Everything that one client gets."""
    image = {"type": "image_url", "image_url": {"url": asked["image"], "detail": "low"}}
    messages: Any = [{"role": "user", "content": [image, {"type": "text", "text": asked["question"]}]}]
    chat: dict[str, Any] = {"model": "nano", "messages": messages, "max_tokens": 8}
    return {
        "version": openai.__version__,
        "models": [model.id for model in client.models.list()],
        "model": client.models.retrieve("nano").id,
        "chat": whole(client, chat),
        "stream": streamed(client, chat),
        "logprobs": with_logprobs(client, chat),
        "sampled": sampled(client, chat),
        "async": asyncio.run(asynchronous(url, client.api_key, chat)),
        "completion": completion(client, asked["prompt"]),
        "errors": errors(client, chat),
        "left": leave(client),
    }


def whole(client: openai.OpenAI, chat: dict[str, Any]) -> dict[str, Any]:
    """One answer, with its numbers."""
    raw = client.chat.completions.with_raw_response.create(**chat, extra_headers={"X-Request-Id": "mine-7"})
    answer: Any = raw.parse()
    (choice,) = answer.choices
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "usage": answer.usage.model_dump(),
        "request_id": raw.headers["x-request-id"],
    }


def streamed(client: openai.OpenAI, chat: dict[str, Any]) -> dict[str, Any]:
    """The same as a stream."""
    create: Any = client.chat.completions.create
    *chunks, last = create(**chat, stream=True, stream_options={"include_usage": True})
    return {
        "text": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "role": chunks[0].choices[0].delta.role,
        "finish_reasons": [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason],
        "usage": last.usage.model_dump(),
    }


def with_logprobs(client: openai.OpenAI, chat: dict[str, Any]) -> dict[str, Any]:
    """The log-probabilities of an answer's tokens."""
    (choice,) = client.chat.completions.create(**chat, logprobs=True, top_logprobs=3).choices
    entries = choice.logprobs.content
    return {
        "text": bytes(byte for entry in entries for byte in entry.bytes).decode(),
        "logprobs": [entry.logprob for entry in entries],
        "best": [entry.top_logprobs[0].logprob for entry in entries],
    }


def sampled(client: openai.OpenAI, chat: dict[str, Any]) -> list[str]:
    """Two answers drawn with seeds 7 and 8."""
    answer = client.chat.completions.create(**chat, n=2, seed=7, temperature=2, extra_body={"ignore_eos": True})
    return [choice.message.content for choice in answer.choices]


async def asynchronous(url: str, key: str, chat: dict[str, Any]) -> list[str]:
    """Eight answers at the same time."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
        answers = await asyncio.gather(*(client.chat.completions.create(**chat) for _ in range(8)))
    return [answer.choices[0].message.content for answer in answers]


def completion(client: openai.OpenAI, prompt: str) -> dict[str, Any]:
    """A text that is continued, whole and as a stream, and the log-probabilities of the text itself."""
    body: dict[str, Any] = {"model": "nano", "prompt": prompt, "max_tokens": 5, "temperature": 0}
    echo = client.completions.create(**body, echo=True, logprobs=1).choices[0]
    return {
        "text": client.completions.create(**body).choices[0].text,
        "streamed": "".join(chunk.choices[0].text for chunk in client.completions.create(**body, stream=True)),
        "echo": echo.text,
        "token_logprobs": echo.logprobs.token_logprobs,
    }


def errors(client: openai.OpenAI, chat: dict[str, Any]) -> dict[str, list[Any]]:
    """The class and the fields of the exception that each mistake raises."""
    create: Any = client.chat.completions.create
    remote = {"type": "image_url", "image_url": {"url": "https://example.com/cat.jpg"}}
    mistakes = {
        "temperature": lambda: create(**chat, temperature=5),
        "tools": lambda: create(**chat, tools=[{"type": "function", "function": {"name": "f"}}]),
        "remote image": lambda: create(**chat | {"messages": [{"role": "user", "content": [remote]}]}),
        "long": lambda: create(**chat | {"messages": [{"role": "user", "content": "word " * 3000}]}),
        "stream": lambda: create(**chat, stream=True, temperature=5),
        "model": lambda: create(**chat | {"model": "gpt-4"}),
        "unknown model": lambda: client.models.retrieve("gpt-4"),
        "path": lambda: client.embeddings.create(model="nano", input="hi"),
        "key": lambda: client.with_options(api_key="wrong").models.list(),
    }
    found = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
            found[name] = ["nothing was raised"]
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.status_code, error.code, error.param]
    return found


def leave(client: openai.OpenAI) -> str:
    """Give up one answer after a moment, and close another while it streams; the exception of the first."""
    impatient = client.with_options(timeout=0.3, max_retries=0)
    try:
        impatient.chat.completions.create(**LONG)
        said = "nothing was raised"
    except openai.APITimeoutError as error:
        said = type(error).__name__
    stream = client.chat.completions.create(**LONG, stream=True)
    next(iter(stream))
    stream.close()
    return said


def long_stream(client: openai.OpenAI) -> None:
    """Read a long stream to its end."""
    create: Any = client.chat.completions.create
    begun = False
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        for chunk in create(**LONG, stream=True, logprobs=True, top_logprobs=20):
            if chunk.choices[0].delta.content and not begun:
                begun = True
                print("begun", flush=True)
        ended = ["nothing was raised", ""]
    except openai.APIError as error:
        ended = [type(error).__name__, error.message]
    print(json.dumps(ended), flush=True)


def main() -> None:
    url, key, what = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    if what == "stream":
        long_stream(client)
    else:
        print(json.dumps(contract(client, url, json.load(sys.stdin))))


main()
