"""/v1/completions: text that is continued as it is, without the template of a conversation.

Evaluation suites ask it for the log-probabilities of a given text: `echo` with `logprobs`.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from sphinx_jax.inference.prompt_logprobs import PromptLogprobs
from sphinx_jax.inference.requests import TopLogprobs
from sphinx_jax.server.answers import DONE, PING, CompletionLogprobs, Head, event, finish_reason, token_names, usage
from sphinx_jax.server.api_errors import ApiError
from sphinx_jax.server.generation import Generation, Prompt, tokenize
from sphinx_jax.server.protocol import CompletionRequest
from sphinx_jax.server.ticket import Delivery, deliveries
from sphinx_jax.sphinx import Sphinx


class Echo(NamedTuple):
    """What stands before a completion: the prompt's text, and its log-probabilities if they are asked for."""

    text: str
    logprobs: PromptLogprobs | None


NO_ECHO = Echo("", None)


def completion_prompts(model: Sphinx, body: CompletionRequest) -> list[Prompt]:
    """The prompts as tokens. Raises ApiError on a token that the model does not have."""
    prompts = [tokenize(model, item) if isinstance(item, str) else item for item in body.prompts]
    size = model.config.language.vocab_size
    for tokens in prompts:
        if (largest := max(tokens)) >= size:
            raise ApiError(f"prompt holds the token {largest}, and the model has {size}", param="prompt")
    return [Prompt(tokens, raw=True, continues=True) for tokens in prompts]


def echoes(model: Sphinx, body: CompletionRequest, logprobs: Sequence[PromptLogprobs | None]) -> list[Echo]:
    """What `body.echo` puts before each answer; `logprobs` are those of each prompt."""
    texts = [item if isinstance(item, str) else model.tokenizer.decode(item) for item in body.prompts]
    return [Echo(text, values) for text, values in zip(texts, logprobs, strict=True) for _ in range(body.n or 1)]


async def completion_object(
    model: Sphinx, name: str, body: CompletionRequest, work: Generation, before: Sequence[Echo]
) -> dict[str, Any]:
    """All completions, once they have ended. Raises ApiError if one ended by an error."""
    choices = [_Choice(model, body, work, i, before[i]) for i in range(len(work.tickets))]
    async for item in deliveries(work.tickets, work.wake):
        if item is not None:
            choices[item[0]].add(item[1])
    head = Head("text_completion", "cmpl", name, work.seed)
    return head([choice.whole() for choice in choices], usage(work.tickets, work.n, model.config.num_image_tokens))


async def completion_events(
    model: Sphinx, name: str, body: CompletionRequest, work: Generation
) -> AsyncIterator[bytes]:
    """The events of a stream: the text as it comes, the end of each choice, usage if asked for, [DONE]."""
    head = Head("text_completion", "cmpl", name, work.seed)
    choices = [_Choice(model, body, work, i, NO_ECHO) for i in range(len(work.tickets))]

    def numbers() -> dict[str, Any]:
        return usage(work.tickets, work.n, model.config.num_image_tokens)

    try:
        async for item in deliveries(work.tickets, work.wake):
            if item is None:
                yield PING
                continue
            i, delivery, is_last = item
            reason = finish_reason(work.tickets[i]) if is_last else None
            if delivery.text or is_last or (body.logprobs is not None and delivery.tokens):
                yield event(
                    head([choices[i].piece(delivery, reason)], numbers() if body.reports_usage_always else None)
                )
        if body.reports_usage:
            yield event(head([], numbers()))
    except ApiError as error:
        yield event(error.body())
    yield DONE


def echo_object(
    model: Sphinx, name: str, body: CompletionRequest, prompts: Sequence[Prompt], before: Sequence[Echo]
) -> dict[str, Any]:
    """The prompts alone, for max_tokens 0."""
    choices = [
        {"index": i, "text": echo.text, "logprobs": _of_prompt(model, body, echo), "finish_reason": "length"}
        for i, echo in enumerate(before)
    ]
    length = sum(len(prompt.tokens) for prompt in prompts)
    numbers = {"prompt_tokens": length, "completion_tokens": 0, "total_tokens": length}
    return Head("text_completion", "cmpl", name, body.seed or 0)(choices, numbers)


def _of_prompt(model: Sphinx, body: CompletionRequest, echo: Echo) -> dict[str, list] | None:
    if echo.logprobs is None:
        return None
    lists = CompletionLogprobs(token_names(model.tokenizer), continues=False)
    return lists.of(*_columns(echo.logprobs, body.logprobs or 0))


def _columns(prompt: PromptLogprobs, top: int) -> tuple[Sequence[int], list[float | None], list[TopLogprobs | None]]:
    """Tokens, log-probabilities and alternatives; the first token of a prompt has none."""
    tops = [TopLogprobs(ids[:top], values[:top]) for ids, values in prompt.top]
    return prompt.tokens, [None, *prompt.logprobs], [None, *tops]


class _Choice:
    """One completion of several: its text and log-probabilities so far."""

    def __init__(self, model: Sphinx, body: CompletionRequest, work: Generation, index: int, echo: Echo):
        self._ticket, self._index, self._top = work.tickets[index], index, body.logprobs
        self._texts = [echo.text]
        self._logprobs = _of_prompt(model, body, echo)
        self._lists = CompletionLogprobs(token_names(model.tokenizer), offset=len(echo.text))

    def add(self, delivery: Delivery) -> None:
        """What is new."""
        self._texts.append(delivery.text)
        new = self._lists_of(delivery)
        if new is None:
            return
        self._logprobs = new if self._logprobs is None else {k: self._logprobs[k] + new[k] for k in new}

    def _lists_of(self, delivery: Delivery) -> dict[str, list] | None:
        if self._top is None:
            return None
        tops = delivery.top_logprobs or [TopLogprobs([], [])] * len(delivery.tokens)
        return self._lists.of(delivery.tokens, delivery.logprobs, tops)

    def whole(self) -> dict[str, Any]:
        """The choice of a whole completion. Raises ApiError if it ended by an error."""
        return self._fields("".join(self._texts), self._logprobs, finish_reason(self._ticket))

    def piece(self, delivery: Delivery, reason: str | None) -> dict[str, Any]:
        """The choice of a stream's event."""
        return self._fields(delivery.text, self._lists_of(delivery), reason)

    def _fields(self, text: str, logprobs: dict | None, reason: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}
