"""The OpenAPI description of what the server takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from camelid import __version__
from camelid.model.config import LlamaConfig
from camelid.serve import replies
from camelid.serve.auth import OPEN
from camelid.serve.requests import (
    MOST_DIMENSIONS,
    MOST_IDS,
    Body,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponseRequest,
    TokenizeRequest,
)

POSTS: dict[str, tuple[str, type[Body], type[replies.Reply], bool]] = {
    "/v1/chat/completions": ("A conversation's next message", ChatRequest, replies.ChatCompletion, True),
    "/v1/completions": ("How a text goes on", CompletionRequest, replies.Completion, True),
    "/v1/embeddings": ("Vectors of texts", EmbeddingRequest, replies.Embeddings, False),
    "/v1/responses": ("A conversation's next message, in the newer form", ResponseRequest, replies.Response, True),
    "/tokenize": ("Ids of a text or a conversation", TokenizeRequest, replies.Tokens, False),
}
GETS: dict[str, tuple[str, type[replies.Reply]]] = {
    "/v1/models": ("The models", replies.Models),
    "/health": ("Whether the server is ready", replies.Health),
}
FAULTS = ("400", "401", "403", "404", "405", "408", "413", "415", "429", "500", "503")


def described(models: Sequence[str], config: LlamaConfig) -> dict[str, Any]:
    """OpenAPI 3.1. `models` are the names that a request may give, `config` is theirs."""
    kinds = [kind for _, *two, _ in POSTS.values() for kind in two] + [kind for _, kind in GETS.values()]
    inputs = {one[1] for one in POSTS.values()}
    modes = [(kind, "validation" if kind in inputs else "serialization") for kind in [*kinds, replies.Error]]
    _, schemas = models_json_schema(modes, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    for name, schema in schemas["$defs"].items():
        field = schema.get("properties", {}).get("model")
        if name.endswith("Request") and field is not None:
            schema["properties"]["model"] = {"type": "string", "enum": list(models)}
    narrowed = _narrowed(schemas["$defs"], config)
    return {
        "openapi": "3.1.0",
        "info": {"title": "camelid", "version": __version__},
        "paths": {**_posts(), **_gets(), "/v1/models/{name}": {"get": _model()}, "/metrics": {"get": _metrics()}},
        "components": {"schemas": narrowed, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def _narrowed(schema: Any, config: LlamaConfig) -> Any:
    """With the ranges that only this model knows: of token ids and of dimensions."""
    if isinstance(schema, list):
        return [_narrowed(one, config) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("exclusiveMaximum") == MOST_IDS:
        return {**schema, "exclusiveMaximum": config.vocab_size}
    if schema.get("maximum") == MOST_DIMENSIONS:
        return {**schema, "maximum": config.hidden_size}
    return {key: _narrowed(value, config) for key, value in schema.items()}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _faults() -> dict[str, Any]:
    return {status: {"description": "refused or failed", "content": _json("Error")} for status in FAULTS}


def _posts() -> dict[str, Any]:
    paths = {}
    for path, (summary, request, answer, streams) in POSTS.items():
        content = _json(answer.__name__)
        if streams:
            content["text/event-stream"] = {}
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {"required": True, "content": _json(request.__name__)},
                "responses": {"200": {"description": "done", "content": content, **_links(path)}, **_faults()},
            }
        }
    return paths


def _links(path: str) -> dict[str, Any]:
    return {"links": LINKS[path]} if path in LINKS else {}


def _gets() -> dict[str, Any]:
    return {
        path: {
            "get": {
                "summary": summary,
                "operationId": path.strip("/").replace("/", "_"),
                "responses": {
                    "200": {"description": "done", "content": _json(answer.__name__), **_links(path)},
                    **_faults(),
                },
                **({"security": []} if path in OPEN else {}),
            }
        }
        for path, (summary, answer) in GETS.items()
    }


def _model() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    done = {"description": "done", "content": _json("Model")}
    return {
        "summary": "One model",
        "operationId": "model",
        "parameters": [name],
        "responses": {"200": done, **_faults()},
    }


# What an answer is good for in the next request.
LINKS: dict[str, dict[str, Any]] = {
    "/v1/models": {"model": {"operationId": "model", "parameters": {"name": "$response.body#/data/0/id"}}},
    "/tokenize": {
        "completion": {
            "operationId": "v1_completions",
            "requestBody": {"model": "$response.body#/model", "prompt": "$response.body#/ids", "max_tokens": 2},
        }
    },
}


def _metrics() -> dict[str, Any]:
    done = {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"summary": "Figures", "operationId": "metrics", "responses": {"200": done, **_faults()}}
