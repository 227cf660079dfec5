"""What stands before every route: request ids, host, key, content type, and bounds on bodies. Pure ASGI.

Each check ends in an error object, before anything of the body is read that need not be.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sphinx_jax.server.api_errors import ApiError, overloaded

log = logging.getLogger(__name__)

BODY_SECONDS = 60.0
"""A body that has not come by then is not waited for."""

MAX_BODIES_BYTES = 512 << 20
"""Bodies in memory at the same time."""

DISCARDED_BYTES, DISCARD_SECONDS = 256 << 20, 10.0
"""Of the body of a request that is refused, so much is read at most, and kept nowhere."""

OPEN_PATHS = ("/", "/health")
"""Served without a key; and so are the files of the page."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Guards:
    """Wraps an application. `count_rejection(reason)` is told of each request that is refused here."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        hosts: Collection[str] | None,
        public_metrics: bool,
        max_body_bytes: int,
        count_rejection: Callable[[str], None],
    ):
        self._app, self._hosts, self._max_body_bytes = app, hosts, max_body_bytes
        # Keys are compared by their digests: that takes the same time wherever they differ.
        self._key = None if api_key is None else _digest(api_key.encode())
        self._open_paths = (*OPEN_PATHS, "/metrics") if public_metrics else OPEN_PATHS
        self._count_rejection = count_rejection
        self._bodies_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        response = _LoggedResponse(scope, headers, send)
        try:
            self._check(scope, headers)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                await self._with_body(scope, headers, receive, response)
            else:
                await self._app(scope, receive, response.send)
        except ApiError as error:
            self._count_rejection(error.code or error.type)
            if not response.body_is_read:
                await _discard(receive)
            await response.fail(error)
        except Exception:
            log.exception("%s: the server failed", response.request_id)
            await response.fail(ApiError("the server failed; its log says why", status=500, code="internal_error"))
        finally:
            response.log()

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises ApiError on a wrong host, key or content type."""
        host = _without_port(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            # Without this, a page of another site reaches a server on localhost by a name that it points there.
            raise ApiError(
                f"the host {host!r:.80} is not served here; start with --allowed-hosts to name it",
                status=403,
                code="invalid_host",
            )
        path = scope["path"]
        if self._key is not None and path not in self._open_paths and not path.startswith("/page/"):
            self._check_key(headers.get("authorization", ""))
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            # A browser asks before it sends this type to another site, and is told no.
            raise ApiError("the content type must be application/json", status=415, code="unsupported_media_type")

    def _check_key(self, authorization: str) -> None:
        assert self._key is not None
        scheme, _, key = authorization.partition(" ")
        right = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._key)
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _with_body(
        self, scope: Scope, headers: dict[str, str], receive: Receive, response: "_LoggedResponse"
    ) -> None:
        """Run the application with the whole body, which is counted as long as the application holds it."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()
        counted = 0
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    part, more = message.get("body", b""), message.get("more_body", False)
                    response.body_is_read = not more
                    counted += len(part)
                    self._bodies_bytes += len(part)
                    if counted > self._max_body_bytes:
                        raise self._too_large()
                    if self._bodies_bytes > MAX_BODIES_BYTES:
                        raise overloaded("too many large requests at once; try again in a moment")
                    parts.append(part)
            await self._app(scope, _replay(b"".join(parts), receive), response.send)
        except TimeoutError:
            error = ApiError(f"the body did not come within {BODY_SECONDS:g} seconds", status=408, code="timeout")
            await response.fail(error)
        finally:
            self._bodies_bytes -= counted

    def _too_large(self) -> ApiError:
        return ApiError(
            f"the body is larger than {self._max_body_bytes >> 20} MiB; send a smaller image, or raise --max-body-mib",
            status=413,
            code="body_too_large",
        )


class _LoggedResponse:
    """One request and its response: adds the request id, and knows what was sent."""

    def __init__(self, scope: Scope, headers: dict[str, str], send: Send):
        given = headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        self._scope, self._send, self._start = scope, send, time.perf_counter()
        self._status: int | None = None
        self.body_is_read = False
        """The whole body was read."""
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def send(self, message: Message) -> None:
        """Pass a message on, the first with the request id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode("latin-1"))]
            message = {**message, "headers": [*headers, (b"x-content-type-options", b"nosniff")]}
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Answer with an error, unless the response has begun: then the connection is cut."""
        if self._status is None:

            async def no_more() -> Message:
                return {"type": "http.disconnect"}

            await error.response()(self._scope, no_more, self.send)

    def log(self) -> None:
        """One line a request: nothing of what was said."""
        seconds = time.perf_counter() - self._start
        describe = self._scope["state"].get("describe", str)
        status = self._status or "gone"
        method, path = self._scope["method"], self._scope["path"]
        # What watches the server asks every few seconds.
        level = logging.DEBUG if path in ("/health", "/metrics") else logging.INFO
        path = path if path.isprintable() else ascii(path)
        log.log(level, "%s %.200s %s %.3f s %s %s", method, path, status, seconds, self.request_id, describe())


async def _discard(receive: Receive) -> None:
    """Read what is left of a body: a client that still sends would see its connection cut, and not the error."""
    left = DISCARDED_BYTES
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            more = True
            while more and left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)
    except TimeoutError:
        pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _without_port(host: str) -> str:
    """The name in a Host header, lower case."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()
