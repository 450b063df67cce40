"""What a request may say: OpenAI's fields with their ranges, and a few of ours (top_k, min_p, …). Unknown fields are
ignored, as OpenAI's clients expect; a known field of the wrong type or out of range is an error that names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from camelid.serve.faults import Fault

MOST_TOKENS = 1 << 20
MOST_IDS, MOST_DIMENSIONS = 1 << 31, 1 << 16  # of any model: the description says what this one has

Text = Annotated[str, Field(max_length=1 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=128)]
TokenId = Annotated[int, Field(ge=0, lt=MOST_IDS)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Sampling(Body):
    """How tokens are chosen, in chats and completions."""

    model: Annotated[str, Field(max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=32)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None = None
    stream: bool | None = None
    user: str | None = None
    # Ours.
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    lookup: Annotated[int, Field(ge=0, le=32)] | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Called(Body):
    name: Name
    arguments: Text


class ToolCall(Body):
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: Called


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=64, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=64, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])


class Function(Body):
    name: Name
    description: Annotated[str, Field(max_length=4096)] | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: Name
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # Ours: the beginning of the answer, as ids. The answer goes on from there.
    begin_with_ids: Annotated[list[TokenId], Field(max_length=1 << 17)] | None = None


Ids = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 17)]
Several, Many = Field(min_length=1, max_length=128), Field(min_length=1, max_length=2048)
Prompts = Text | Ids | Annotated[list[Text], Several] | Annotated[list[Ids], Several]


class CompletionRequest(Sampling):
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    suffix: Literal[""] | None = None


class EmbeddingRequest(Body):
    model: Annotated[str, Field(max_length=256)]
    input: Text | Ids | Annotated[list[Text], Many] | Annotated[list[Ids], Many]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MOST_DIMENSIONS)] | None = None
    user: str | None = None


class InputMessage(Body):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputPart], Field(max_length=64)]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class InputPart(Body):
    type: Literal["input_text", "output_text"]
    text: Text


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseText(Body):
    format: ResponseFormat | None = None


class ResponseRequest(Body):
    """/v1/responses, for text: nothing is stored, no tool is run."""

    model: Annotated[str, Field(max_length=256)]
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=2048)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    store: bool | None = None
    text: ResponseText | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    previous_response_id: None = None
    user: str | None = None


class TokenizeRequest(Body):
    """Ids of a text, or of a conversation as the model reads it."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["text"], "properties": {"text": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )
    model: Annotated[str, Field(max_length=256)] | None = None
    text: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)] | None = None


Kind = TypeVar("Kind", bound=Body)


KINDS = ("string_type", "int_type", "list_type", "dict_type", "model_type", "float_type")


def read(kind: type[Kind], body: dict[str, Any]) -> Kind:
    """The request that a body is. Raises Fault naming the first field at fault."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        # Of a union the kind that the value nearly was is told: the others only say that it is not of their kind.
        first = next((one for one in found if one["type"] not in KINDS), found[0])
        where = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
        raise Fault(400, f"{where or 'the body'}: {first['msg']}", where, "invalid_value") from None


def _is_branch(part: object) -> bool:
    """Whether it is pydantic's name for one kind of a union rather than a field's."""
    return isinstance(part, str) and not part.replace("_", "").isalnum()
