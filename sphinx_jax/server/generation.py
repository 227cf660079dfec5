"""From the body of a request to tickets: the model, the prompt's length, how it is sampled."""

import asyncio
import random
from collections.abc import Sequence
from typing import NamedTuple

from sphinx_jax.errors import UserError
from sphinx_jax.inference.requests import PreparedImage, Request
from sphinx_jax.inference.sampling import SamplingParams
from sphinx_jax.server.answers import token_names
from sphinx_jax.server.api_errors import ApiError
from sphinx_jax.server.protocol import ChatRequest, CompletionRequest
from sphinx_jax.server.settings import Settings
from sphinx_jax.server.ticket import Ticket
from sphinx_jax.sphinx import Sphinx


class Prompt(NamedTuple):
    """What one answer, or several, are asked of."""

    tokens: list[int]
    image: PreparedImage | None = None
    raw: bool = False
    continues: bool = False


class Generation(NamedTuple):
    """The tickets of one HTTP request, `n` in a row for each prompt, and the event that tells of news."""

    tickets: list[Ticket]
    n: int
    seed: int
    wake: asyncio.Event


def tokenize(model: Sphinx, text: str) -> list[int]:
    """Token ids of a raw text, with BOS. Raises ApiError on text that is too long to be worth tokenizing."""
    check_text_len(model, len(text.encode(errors="surrogatepass")))
    return model.tokenizer.encode(text, bos=True, eos=False)


def check_text_len(model: Sphinx, num_bytes: int) -> None:
    """Raises ApiError on so many bytes of text that no tokens of them fit: tokenizing megabytes takes seconds."""
    if num_bytes > token_names(model.tokenizer).longest * model.engine.max_model_len:
        raise too_long(f"the prompt is {num_bytes} bytes long", model)


def too_long(what: str, model: Sphinx) -> ApiError:
    """A prompt that leaves no room for an answer."""
    return ApiError(
        f"{what}, and this model's context of {model.engine.max_model_len} tokens has to hold it and the answer; "
        "shorten it",
        param="messages",
        code="context_length_exceeded",
    )


def generation(
    model: Sphinx,
    settings: Settings,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None,
    top_logprobs: int,
    max_tickets: int,
    adapter: str | None,
) -> Generation:
    """Tickets for `body.n` answers to each of `prompts`. `max_new_tokens` None: what the context leaves.

    Raises ApiError on a prompt that is too long, more answers than `max_tickets`, or a setting out of its range.
    """
    n = body.n or 1
    if n * len(prompts) > max_tickets:
        raise ApiError(
            f"a request may ask for {max_tickets} answers at most, this one for {n * len(prompts)}", param="n"
        )
    seed = random.getrandbits(32) if body.seed is None else body.seed % 2**32
    wake = asyncio.Event()
    tickets = []
    for prompt in prompts:
        prompt_len = _prompt_len(model, prompt)
        left = model.engine.max_model_len - prompt_len
        for i in range(n):
            params = _params(settings, body, (seed + i) % 2**32, min(max_new_tokens or left, left), top_logprobs)
            request = Request(prompt.tokens, prompt.image, params, prompt.raw, prompt.continues, adapter)
            tickets.append(Ticket(request, prompt_len, wake))
    return Generation(tickets, n, seed, wake)


def _prompt_len(model: Sphinx, prompt: Prompt) -> int:
    num_image_tokens = model.config.num_image_tokens if prompt.image else 0
    length = len(prompt.tokens) + num_image_tokens
    if length >= model.engine.max_model_len:
        of_image = f", {num_image_tokens} of them the image" if num_image_tokens else ""
        raise too_long(f"the prompt is {length} tokens long{of_image}", model)
    return length


def _params(
    settings: Settings, body: ChatRequest | CompletionRequest, seed: int, max_new_tokens: int, top_logprobs: int
) -> SamplingParams:
    try:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=settings.temperature if body.temperature is None else body.temperature,
            top_p=settings.top_p if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            seed=seed,
            stop=body.stops,
            ignore_eos=bool(body.ignore_eos),
            top_logprobs=top_logprobs,
        )
    except UserError as error:
        raise ApiError(str(error)) from error
