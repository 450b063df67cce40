"""What answers look like, for the OpenAPI description; tests hold every answer against it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Fault(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Reply):
    error: Fault


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopToken(Reply):
    token: str
    logprob: float
    bytes: list[int]
    token_id: int


class TokenEntry(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(Reply):
    content: list[TokenEntry]
    refusal: None


class CalledFunction(Reply):
    name: str
    arguments: str


class ToolCalled(Reply):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCalled] = []


class ChatChoice(Reply):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Logprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(Reply):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class Embedding(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Reply):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Response(Reply):
    """OpenAI's response object; of its many fields these are ours to fill."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class Tokens(Reply):
    model: str
    count: int
    max_model_len: int
    ids: list[int]
    tokens: list[str]


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    chat: bool


class Models(Reply):
    object: Literal["list"]
    data: list[Model]


class Health(Reply):
    status: Literal["ok", "unavailable"]
