"""The bodies of requests, as OpenAI's protocol has them: fields, types and ranges. Nothing here knows the model.

Unknown fields are passed over, as OpenAI's clients send new ones every month; fields whose neutral value is the only
one that is served are listed, so that another value is an error and not a surprise.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from sphinx_jax.inference.sampling import MAX_TOP_LOGPROBS
from sphinx_jax.server.api_errors import ApiError

MAX_STOPS = 4
"""Stop strings in a request."""

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions where the request names none, as OpenAI has it; a chat takes what the context leaves."""

MAX_PROMPTS = 256
"""Prompts in one request for completions."""

Stops = str | Annotated[list[str | None], Meta(max_length=MAX_STOPS)] | None
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
PositiveInt = Annotated[int, Meta(ge=1, lt=2**31)]


class ImageUrl(Struct):
    url: str
    detail: str | None = None


class TextPart(Struct, tag_field="type", tag="text"):
    text: str


class ImagePart(Struct, tag_field="type", tag="image_url"):
    image_url: ImageUrl


Content = str | list[TextPart | ImagePart] | None


class Message(Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Sampled(Struct, kw_only=True):
    """What chat and completions have in common. None stands for the server's default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    seed: Seed | None = None
    n: PositiveInt | None = None
    stop: Stops = None
    ignore_eos: bool | None = None
    # Served at their neutral values alone.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    def check(self) -> None:
        """Raises ApiError on a combination of fields, or a feature, that is not served."""
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options belongs to a stream: set stream to true", param="stream_options")
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise ApiError(
                    f"{name} is not supported; leave it out, or use repetition_penalty", param=name, code="unsupported"
                )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises ApiError on an empty one."""
        stops = [self.stop] if isinstance(self.stop, str) else [stop for stop in self.stop or () if stop is not None]
        if not all(stops):
            raise ApiError("stop holds an empty text; leave it out", param="stop")
        return tuple(stops)

    @property
    def reports_usage(self) -> bool:
        """Whether the stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def reports_usage_always(self) -> bool:
        """Whether every event of the stream has the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(_Sampled, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        """Raises ApiError on a combination of fields, or a feature, that is not served."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: set logprobs to true", param="top_logprobs")
        if self.tools or self.tool_choice not in (None, "none", "auto"):
            name = "tools" if self.tools else "tool_choice"
            raise ApiError(f"{name} is not supported: this model calls no tools", param=name, code="unsupported")
        if self.response_format is not None and self.response_format.get("type", "text") != "text":
            raise ApiError(
                'response_format must be {"type": "text"}: answers cannot be forced into a schema',
                param="response_format",
                code="unsupported",
            )

    @property
    def max_new_tokens(self) -> int | None:
        """max_completion_tokens, or max_tokens, its older name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Sampled, kw_only=True):
    """The body of /v1/completions: text that is continued, without the template of a conversation."""

    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Raises ApiError on a combination of fields, or a feature, that is not served."""
        super().check()
        if self.suffix:
            raise ApiError("suffix is not supported: text is continued, not filled in", param="suffix")
        if self.best_of not in (None, self.n or 1):
            raise ApiError("best_of is not supported; use n", param="best_of", code="unsupported")
        if self.echo and self.stream:
            raise ApiError("echo cannot be streamed: set stream to false", param="echo")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens must be 1 or more, or echo true", param="max_tokens")

    @property
    def max_new_tokens(self) -> int:
        """max_tokens, or OpenAI's default."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several. Raises ApiError if there are none or too many."""
        given = self.prompt
        several = isinstance(given, list) and not any(isinstance(item, int) for item in given)
        prompts: Any = given if several else [given]
        same_kind = all(isinstance(item, str) for item in prompts) or all(_is_ids(item) for item in prompts)
        if not 1 <= len(prompts) <= MAX_PROMPTS or not all(prompts) or not same_kind:
            raise ApiError(
                f"prompt must be a text, a list of token ids, or 1 to {MAX_PROMPTS} of these, none empty",
                param="prompt",
            )
        return prompts


def _is_ids(item: object) -> bool:
    return isinstance(item, list) and all(isinstance(token, int) for token in item)


class TokenizeRequest(Struct, kw_only=True):
    """The body of /tokenize."""

    prompt: str
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """The body of /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


Body = TypeVar("Body", ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)

_MISSING = re.compile(r"missing required field `(.*?)`")
_PLACE = re.compile(r"(.*) - at `\$\.?(.*)`$", re.DOTALL)


def parse(body: bytes, kind: type[Body]) -> Body:
    """The body of a request. Raises ApiError, with the field that is wrong and what it should be."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        place, missing = _PLACE.match(str(error)), _MISSING.search(str(error))
        problem, param = (place[1], place[2]) if place else (str(error), missing and missing[1])
        problem = problem[0].lower() + problem[1:]
        raise ApiError(f"{param or 'the body'}: {problem}", param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ApiError(f"the body is not JSON that can be read ({reason})") from error
