"""Errors of the HTTP interface: one JSON object, in the shape that OpenAI's clients read."""

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered. `param` names the field that is wrong, `code` is for programs."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The kind of error, by its status."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict:
        """{"error": {"message", "type", "param", "code"}}"""
        detail = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> Response:
        """As an HTTP response."""
        return JsonResponse(self.body(), self.status, self.headers)


def overloaded(message: str) -> ApiError:
    """429: the same request may be served a moment later."""
    return ApiError(message, status=429, code="server_overloaded", headers={"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    """503: the server loads, drains or has failed."""
    return ApiError(message, status=503, code="unavailable", headers={"Retry-After": "5"})


class JsonResponse(Response):
    """JSON made by msgspec."""

    media_type = "application/json"

    def __init__(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(msgspec.json.encode(content), status, headers)
