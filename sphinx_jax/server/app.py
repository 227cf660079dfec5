"""The routes of the server, and the application that is made of them."""

import asyncio
import functools
import importlib.metadata
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from sphinx_jax.errors import UserError
from sphinx_jax.inference.prompt_logprobs import PromptLogprobs
from sphinx_jax.server import chat, completions
from sphinx_jax.server.api_errors import ApiError, JsonResponse, overloaded
from sphinx_jax.server.bridge import Bridge
from sphinx_jax.server.generation import Generation, Prompt, generation, tokenize
from sphinx_jax.server.guards import Guards
from sphinx_jax.server.messages import ImageReader
from sphinx_jax.server.metrics import Metrics
from sphinx_jax.server.openapi import document
from sphinx_jax.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from sphinx_jax.server.settings import Settings
from sphinx_jax.server.streaming import EventStream, Gone, unless_gone
from sphinx_jax.server.ticket import Ticket
from sphinx_jax.sphinx import Sphinx

T = TypeVar("T")

THREADS = 2
"""Threads that parse bodies, and as many that decode images, beside the event loop and the engine's."""

MAX_PENDING = 256
"""Bodies that wait for these threads: an image may take a second of them."""

PAGE_MAX_TOKENS = 512
"""What the page asks for, unless its reader says otherwise."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PAGE_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class Api:
    """The handlers of all routes."""

    def __init__(self, bridge: Bridge, settings: Settings, metrics: Metrics):
        self._bridge, self._settings, self._metrics = bridge, settings, metrics
        self._created = int(time.time())
        # Two pools: what has no image does not wait for large ones.
        self._pool, self._image_pool = ThreadPoolExecutor(THREADS, "bodies"), ThreadPoolExecutor(THREADS, "images")
        self._pending = 0

    def routes(self) -> list[Route]:
        """Every route of the server."""
        return [
            Route("/", self.page),
            Route("/page/{name}", self.page),
            Route("/health", self.health),
            Route("/version", self.version),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
        ]

    # Of the server

    async def page(self, request: Request) -> Response:
        """A file of the page."""
        name = request.path_params.get("name", "index.html")
        file = resources.files("sphinx_jax.server") / "page" / name
        kind = _PAGE_TYPES.get(name.rpartition(".")[2])
        if kind is None or "/" in name or "\\" in name or not file.is_file():
            raise HTTPException(404)
        return Response(file.read_bytes(), media_type=kind, headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        """200 once every program is compiled."""
        bridge = self._bridge
        content = {"status": bridge.status}
        if bridge.status == "loading":
            content["progress"] = bridge.progress
        return JsonResponse(content, 200 if bridge.status == "ready" else 503)

    async def version(self, request: Request) -> Response:
        """The version of the package."""
        return JsonResponse({"version": importlib.metadata.version("sphinx-jax")})

    async def metrics(self, request: Request) -> Response:
        """What the server counts, for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        return JsonResponse(document())

    # Of the model

    def _card(self, name: str) -> dict[str, Any]:
        model = self._bridge.model
        defaults = {"temperature": self._settings.temperature, "top_p": self._settings.top_p}
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "sphinx-jax",
            "max_model_len": model.engine.max_model_len,
            "image_size": model.config.vision.image_size if model.config.vision else None,
            "num_image_tokens": model.config.num_image_tokens if model.config.vision else 0,
            "defaults": {**defaults, "max_tokens": PAGE_MAX_TOKENS, "seed": None},
            # As in vLLM, an adapter names its base.
            **({"parent": self._settings.model_names[0]} if name in self._settings.adapters else {}),
        }

    async def models(self, request: Request) -> Response:
        """The model, by each of its names, and its adapters."""
        return JsonResponse({"object": "list", "data": [self._card(name) for name in self._settings.served_names]})

    async def one_model(self, request: Request) -> Response:
        """The card of one name."""
        return JsonResponse(self._card(self._known(request.path_params["name"])))

    def _known(self, name: str | None) -> str:
        """The name under which the answer goes. Raises ApiError if no model has it."""
        names = self._settings.served_names
        if name is not None and name not in names:
            others = f", or an adapter: {', '.join(self._settings.adapters)}" if self._settings.adapters else ""
            raise ApiError(
                f"the model {name!r:.100} is not served here; use {names[0]!r}{others}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name or names[0]

    def _adapter(self, name: str) -> str | None:
        """The adapter of that name; None: it is the base's."""
        return name if name in self._settings.adapters else None

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text."""
        model = self._bridge.model

        def work(body: bytes) -> dict:
            asked = parse(body, TokenizeRequest)
            self._known(asked.model)
            tokens = tokenize(model, asked.prompt)[0 if asked.add_special_tokens else 1 :]
            # lm-eval asks for the id of a special token by its name.
            if not asked.add_special_tokens and (special := _special_token(model, asked.prompt)) is not None:
                tokens = [special]
            return {"tokens": tokens, "count": len(tokens), "max_model_len": model.engine.max_model_len}

        return JsonResponse(await self._in_thread(work, await request.body()))

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        model = self._bridge.model

        def work(body: bytes) -> dict:
            return {"prompt": model.tokenizer.decode(parse(body, DetokenizeRequest).tokens)}

        return JsonResponse(await self._in_thread(work, await request.body()))

    async def tokenizer_info(self, request: Request) -> Response:
        """The special tokens: with them lm-eval needs no tokenizer of its own."""
        tokenizer = self._bridge.model.tokenizer
        special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        return JsonResponse({name: tokenizer.token_name(token) for name, token in special.items()})

    # Answers

    async def chat_completions(self, request: Request) -> Response:
        """An answer to a conversation."""
        model = self._bridge.model
        reader = ImageReader(model.prepare_image, self._settings.image_root)

        def prepare(data: bytes) -> tuple[ChatRequest, str, Generation]:
            body = parse(data, ChatRequest)
            body.check()
            name = self._known(body.model)
            prompt = chat.chat_prompt(model, body, reader)
            top_logprobs = body.top_logprobs or 0
            return body, name, self._generation(body, name, [prompt], body.max_new_tokens, top_logprobs)

        body, name, work = await self._in_thread(prepare, await request.body())
        self._submit(request, work)
        if body.stream:
            return self._stream(chat.chat_events(model, name, body, work), work)
        return await self._whole(request, chat.chat_object(model, name, body, work), work)

    async def completions(self, request: Request) -> Response:
        """Texts that go on."""
        model = self._bridge.model

        def prepare(data: bytes) -> tuple[CompletionRequest, str, list[Prompt], Generation]:
            body = parse(data, CompletionRequest)
            body.check()
            name, prompts = self._known(body.model), completions.completion_prompts(model, body)
            work = self._generation(body, name, prompts, body.max_new_tokens or 1, body.logprobs or 0)
            return body, name, prompts, work

        body, name, prompts, work = await self._in_thread(prepare, await request.body())
        if body.stream:
            self._submit(request, work)
            return self._stream(completions.completion_events(model, name, body, work), work)

        async def answer() -> dict[str, Any]:
            before = [completions.NO_ECHO] * len(work.tickets)
            if body.echo:
                before = completions.echoes(model, body, await self._prompt_logprobs(body, name, prompts))
            if not body.max_new_tokens:
                return completions.echo_object(model, name, body, prompts, before)
            self._submit(request, work)
            return await completions.completion_object(model, name, body, work, before)

        return await self._whole(request, answer(), work)

    async def _prompt_logprobs(
        self, body: CompletionRequest, name: str, prompts: list[Prompt]
    ) -> list[PromptLogprobs | None]:
        """The log-probabilities of the tokens of each prompt, between two rounds of the scheduler."""
        served = self._bridge.served
        if body.logprobs is None or served is None:
            return [None] * len(prompts)
        score = functools.partial(served.lockstep.prompt_logprobs, adapter=self._adapter(name))
        return [await self._bridge.call(functools.partial(score, prompt.tokens)) for prompt in prompts]

    def _generation(
        self, body: Any, name: str, prompts: list, max_new_tokens: int | None, top_logprobs: int
    ) -> Generation:
        bridge, limits = self._bridge, (max_new_tokens, top_logprobs, self._bridge.room)
        return generation(bridge.model, self._settings, body, prompts, *limits, self._adapter(name))

    def _submit(self, request: Request, work: Generation) -> None:
        self._bridge.submit(work.tickets)
        request.state.describe = lambda: describe(work.tickets)

    def _stream(self, events: Any, work: Generation) -> Response:
        return EventStream(events, lambda: self._bridge.give_up(work.tickets))

    async def _whole(self, request: Request, making: Coroutine[Any, Any, dict], work: Generation) -> Response:
        """The answer as one object; its tickets are given up as soon as the client is gone."""
        try:
            return JsonResponse(await unless_gone(request.receive, making))
        except Gone:
            return Response(status_code=499)
        finally:
            self._bridge.give_up(work.tickets)

    async def _in_thread(self, function: Callable[[bytes], T], data: bytes) -> T:
        """`function(data)` beside the event loop. Raises ApiError for what a user caused, or if too many wait."""
        if self._pending >= MAX_PENDING:
            raise overloaded("too many requests are being read; try again in a moment")
        self._pending += 1
        pool = self._image_pool if b'"image_url"' in data else self._pool
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, function, data)
        except UserError as error:
            raise ApiError(str(error)) from error
        finally:
            self._pending -= 1


def _special_token(model: Sphinx, text: str) -> int | None:
    """The id of BOS or EOS if `text` is its name."""
    ids = (model.tokenizer.bos_id, model.tokenizer.eos_id)
    return {model.tokenizer.token_name(token): token for token in ids}.get(text)


def describe(tickets: Sequence[Ticket]) -> str:
    """Numbers of a request for the log: nothing of what was said."""
    prompt, cached = sum(ticket.prompt_len for ticket in tickets), sum(ticket.cached_tokens for ticket in tickets)
    answer = sum(ticket.num_tokens for ticket in tickets)
    ends = sorted({str(ticket.finish) for ticket in tickets})
    return f"prompt {prompt} ({cached} cached) answer {answer} {'/'.join(ends)}"


def make_app(bridge: Bridge, settings: Settings) -> ASGIApp:
    """The application: routes behind guards."""
    metrics = Metrics(bridge)
    bridge.on_end = metrics.count

    def count_rejection(reason: str) -> None:
        metrics.rejected.labels(reason).inc()

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        count_rejection(error.code or error.type)
        return error.response()

    return Guards(
        Starlette(
            routes=Api(bridge, settings, metrics).routes(),
            exception_handlers={HTTPException: _http_error, ApiError: api_error},
        ),
        api_key=settings.api_key,
        hosts=settings.hosts,
        public_metrics=settings.public_metrics,
        max_body_bytes=settings.max_body_bytes,
        count_rejection=count_rejection,
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not, in the shape of all errors."""
    assert isinstance(error, HTTPException)
    what = "method" if error.status_code == 405 else "path"
    message = f"no {what} {request.method if what == 'method' else request.url.path!r:.200} here; see /openapi.json"
    return ApiError(message, status=error.status_code, headers=error.headers).response()
