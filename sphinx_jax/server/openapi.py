"""The OpenAPI document: the routes, and the schemas of their bodies as msgspec knows them."""

import functools
import importlib.metadata
from typing import Any

import msgspec

from sphinx_jax.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_BODIES = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation about an image, or none."),
    "/v1/completions": (CompletionRequest, "Continue a text."),
    "/tokenize": (TokenizeRequest, "The token ids of a text."),
    "/detokenize": (DetokenizeRequest, "The text of token ids."),
}
_READS = {
    "/v1/models": "The model that is served, by each of its names.",
    "/v1/models/{name}": "One model.",
    "/health": "Whether requests are taken.",
    "/version": "The version of the server.",
    "/metrics": "Counters for Prometheus.",
    "/tokenizer_info": "The special tokens.",
}
_STATUSES = {
    "400": "A field is wrong.",
    "401": "The API key is missing or wrong.",
    "403": "The Host header is not served.",
    "404": "There is no such model or path.",
    "405": "There is no such method here.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The content type is not application/json.",
    "429": "The queue is full.",
    "500": "The answer ended by an error.",
    "503": "The model loads, or the server shuts down.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@functools.cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds = [kind for kind, _ in _BODIES.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths = {path: {"get": _operation(path, text)} for path, text in _READS.items()}
    for (path, (_, text)), schema in zip(_BODIES.items(), schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {**_operation(path, text), "requestBody": body}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sphinx-jax", "version": importlib.metadata.version("sphinx-jax")},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(path: str, text: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    kind = "text/plain" if path == "/metrics" else "application/json"
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": {kind: {}}}}
    if path == "/v1/chat/completions" or path == "/v1/completions":
        answers["200"]["content"]["text/event-stream"] = {}
    if path == "/health":
        answers["503"] = {"description": "Not yet, or no more.", "content": {"application/json": {}}}
    for status, description in _STATUSES.items():
        answers.setdefault(status, {"description": description, "content": error})
    operation = {"summary": text, "responses": answers}
    if "{name}" in path:
        schema = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    return operation
