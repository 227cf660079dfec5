"""/v1/chat/completions: an answer as one object, or as a stream of its pieces."""

from collections.abc import AsyncIterator
from typing import Any

from sphinx_jax.server.answers import (
    DONE,
    PING,
    Head,
    TokenNames,
    chat_logprobs,
    event,
    finish_reason,
    token_names,
    usage,
)
from sphinx_jax.server.api_errors import ApiError
from sphinx_jax.server.generation import Generation, Prompt, check_text_len
from sphinx_jax.server.messages import ImageReader, read_chat
from sphinx_jax.server.protocol import ChatRequest
from sphinx_jax.server.ticket import Delivery, deliveries
from sphinx_jax.sphinx import Sphinx


def chat_prompt(model: Sphinx, body: ChatRequest, reader: ImageReader) -> Prompt:
    """What the messages ask, its image decoded. Raises ApiError on what this model cannot read."""

    def read_image(url: str, param: str):
        if model.config.vision is None:
            raise ApiError("this model takes text only; leave the image out", param=param)
        return reader.read(url, param)

    chat = read_chat(body.messages, read_image)
    check_text_len(model, len(chat.conversation.text().encode(errors="surrogatepass")))
    if model.engine.refuses_forged_turns:
        chat.conversation.check_forged_turns()
    tokens = chat.conversation.prompt_tokens(model.tokenizer, chat.prefix)
    # A chat template has no end signal: its answers end with a token.
    raw = model.tokenizer.chat_template is not None
    return Prompt(tokens, chat.image, raw, continues=bool(chat.prefix))


async def chat_object(model: Sphinx, name: str, body: ChatRequest, work: Generation) -> dict[str, Any]:
    """The whole answer, once it has ended. Raises ApiError if it ended by an error."""
    parts = [_Choice(model, body, work, i) for i in range(len(work.tickets))]
    async for item in deliveries(work.tickets, work.wake):
        if item is not None:
            parts[item[0]].add(item[1])
    head = Head("chat.completion", "chatcmpl", name, work.seed)
    return head([part.message() for part in parts], usage(work.tickets, work.n, model.config.num_image_tokens))


async def chat_events(model: Sphinx, name: str, body: ChatRequest, work: Generation) -> AsyncIterator[bytes]:
    """The events of a stream: the role, the text as it comes, the end of each choice, usage if asked for, [DONE]."""
    head = Head("chat.completion.chunk", "chatcmpl", name, work.seed)
    choices = [_Choice(model, body, work, i) for i in range(len(work.tickets))]

    def numbers() -> dict[str, Any]:
        return usage(work.tickets, work.n, model.config.num_image_tokens)

    def chunk(choices: list[dict]) -> bytes:
        content = head(choices, numbers() if body.reports_usage_always else None)
        # Where usage comes at the end, OpenAI's other chunks say so with null.
        return event(content if body.reports_usage_always or not body.reports_usage else {**content, "usage": None})

    for choice in choices:
        yield chunk([choice.delta({"role": "assistant", "content": ""}, None, None)])
    try:
        async for item in deliveries(work.tickets, work.wake):
            if item is None:
                yield PING
                continue
            i, delivery, is_last = item
            reason = finish_reason(work.tickets[i]) if is_last else None
            if delivery.text or is_last or (body.logprobs and delivery.tokens):
                yield chunk([choices[i].piece(delivery, reason)])
        if body.reports_usage:
            yield event(head([], numbers()))
    except ApiError as error:
        yield event(error.body())
    yield DONE


class _Choice:
    """One answer of several: its text and log-probabilities so far."""

    def __init__(self, model: Sphinx, body: ChatRequest, work: Generation, index: int):
        self._ticket, self._index = work.tickets[index], index
        self._names: TokenNames | None = token_names(model.tokenizer) if body.logprobs else None
        self._texts: list[str] = []
        self._logprobs: list[dict] = []
        self._position = 0

    def add(self, delivery: Delivery) -> None:
        """What is new."""
        self._texts.append(delivery.text)
        if (new := self._logprobs_of(delivery)) is not None:
            self._logprobs += new["content"]

    def _logprobs_of(self, delivery: Delivery) -> dict[str, Any] | None:
        if self._names is None:
            return None
        position, self._position = self._position, self._position + len(delivery.tokens)
        return chat_logprobs(self._names, self._ticket.request, delivery, position)

    def message(self) -> dict[str, Any]:
        """The choice of a whole answer. Raises ApiError if it ended by an error."""
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": "".join(self._texts), "refusal": None},
            "logprobs": None if self._names is None else {"content": self._logprobs, "refusal": None},
            "finish_reason": finish_reason(self._ticket),
        }

    def piece(self, delivery: Delivery, reason: str | None) -> dict[str, Any]:
        """The choice of a stream's event."""
        delta = {"content": delivery.text} if delivery.text else {}
        return self.delta(delta, self._logprobs_of(delivery), reason)

    def delta(self, delta: dict, logprobs: dict | None, reason: str | None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
