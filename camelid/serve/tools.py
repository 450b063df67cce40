"""Functions that a model may call: how they are told to it, and how a call is read from what it writes.

A template that knows `tools` is given them. Else they are described in the system message, and a call is one JSON
object, {"name": …, "arguments": {…}}. A call that is asked for is held to its schema token by token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from camelid.disk import is_json
from camelid.generate.constrain import Form
from camelid.serve.faults import Fault
from camelid.serve.limits import finite_number, is_unicode, parse
from camelid.serve.requests import ChatMessage, ChatRequest, NamedTool, Tool

INSTRUCTION = (
    "You can call these functions, one JSON description a line:\n{tools}\n"
    'To call one, answer with nothing but {{"name": its name, "arguments": an object}}.'
)
LITERALS = ("const", "enum", "default", "examples")  # of a schema: what they hold is none
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # a caller's names
_BETWEEN = re.compile(r"^(?:[ \t\r\n;,]|</?tool_call>)*")
_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*')


@dataclass(frozen=True)
class FunctionCall:
    name: str
    arguments: str  # JSON


def offered(request: ChatRequest) -> list[Tool]:
    """The tools that the model hears of. Raises Fault for a choice that is not among them."""
    tools = list(request.tools or [])
    names = [tool.function.name for tool in tools]
    if len(set(names)) != len(names):
        raise Fault(400, "two tools have one name", "tools", "invalid_value")
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise Fault(400, "tool_choice names none of the tools", "tool_choice", "invalid_value")
        return [tool for tool in tools if tool.function.name == choice.function.name]
    if choice == "required" and not tools:
        raise Fault(400, "tool_choice is required, but there are no tools", "tool_choice", "invalid_value")
    return [] if choice == "none" else tools


def demanded(request: ChatRequest) -> bool:
    return isinstance(request.tool_choice, NamedTool) or request.tool_choice == "required"


def form(tools: Sequence[Tool]) -> Form:
    """One call of one of the tools."""
    either: list[dict[str, Any]] = []
    parameters: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        place = f"#/$defs/{number}"
        parameters[str(number)] = _elsewhere(tool.function.parameters or {"type": "object"}, place)
        either.append({
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": place}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    whole = either[0] if len(either) == 1 else {"anyOf": either}
    return Form("json_schema", json.dumps({**whole, "$defs": parameters}))


def _elsewhere(schema: Any, place: str) -> Any:
    """A schema whose references into itself are right where it stands at a place of a larger one."""
    if isinstance(schema, list):
        return [_elsewhere(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in SCHEMAS_BY_NAME and isinstance(value, dict):
            moved[key] = {name: _elsewhere(one, place) for name, one in value.items()}
        else:
            moved[key] = value if key in LITERALS else _elsewhere(value, place)
    if isinstance(moved.get("$ref"), str):
        moved["$ref"] = re.sub("^#(?=/|$)", place, moved["$ref"])  # not an anchor's name
    return moved


def messages(said: Sequence[ChatMessage], tools: Sequence[Tool], template: str) -> list[dict[str, Any]]:
    """The conversation as the template takes it."""
    if tools_known(template):
        return [_native(message) for message in said]
    told: list[dict[str, Any]] = []
    for message, before in zip(said, [None, *said], strict=False):
        one = _plain(message)
        if before is not None and message.role == before.role == "tool":  # one turn: templates want them to alternate
            told[-1]["content"] += f"\n{one['content']}"
        else:
            told.append(one)
    if tools:
        lines = "\n".join(json.dumps(t.function.model_dump(exclude_none=True), ensure_ascii=False) for t in tools)
        text = INSTRUCTION.format(tools=lines)
        if told[0]["role"] == "system":
            told[0]["content"] = f"{told[0]['content']}\n\n{text}"
        else:
            told.insert(0, {"role": "system", "content": text})
    return told


def tools_known(template: str) -> bool:
    return re.search(r"\btools\b", template) is not None


def _role(message: ChatMessage) -> str:
    return "system" if message.role == "developer" else message.role


def _native(message: ChatMessage) -> dict[str, Any]:
    told: dict[str, Any] = {"role": _role(message), "content": message.text()}
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    told |= {"name": message.name} if message.name else {}
    return told | ({"tool_call_id": message.tool_call_id} if message.tool_call_id else {})


def _plain(message: ChatMessage) -> dict[str, Any]:
    """For a template that knows text only."""
    if message.role == "tool":
        return {"role": "user", "content": f"Result of the function: {message.text()}"}
    calls = [
        json.dumps({"name": call.function.name, "arguments": _arguments(call)}, ensure_ascii=False)
        for call in message.tool_calls or []
    ]
    return {"role": _role(message), "content": "\n".join([*filter(None, [message.text()]), *calls])}


def _arguments(call: Any) -> dict[str, Any]:
    try:
        return parse(call.function.arguments.encode("utf-8", "replace"), what="the text of a tool call's arguments")
    except Fault as fault:
        raise Fault(400, fault.message, "messages", "invalid_value") from None


def read_calls(text: str, tools: Sequence[Tool], one: bool = False) -> tuple[str, list[FunctionCall]]:
    """An answer as what it says and the calls that end it; no calls unless all that stands there is calls. Of several
    only the first if `one`.

    They come as models write them: each between <tool_call> and </tool_call>, after which nothing counts, or as JSON
    objects one after another (Llama's way, with a ; between), or as an array of those.
    """
    said = text[: certain_text(text)]
    rest = text[len(said) :]
    if rest.lstrip().startswith("<tool_call>"):
        rest = rest[: max((end.end() for end in re.finditer("</tool_call>", rest)), default=len(rest))]
    calls = [_call(value, tools) for value in _values(rest)]
    certain = [call for call in calls if call is not None]
    whole = bool(certain) and len(certain) == len(calls)
    return (said, certain[:1] if one else certain) if whole else (text, [])


def _values(text: str) -> list[Any]:
    """The JSON values that the text is, one after another; [None] for a text that is something else."""
    values: list[Any] = []
    decoder, at = json.JSONDecoder(parse_constant=_no_number, parse_float=finite_number), 0
    while text := _BETWEEN.sub("", text[at:], count=1):
        try:
            value, at = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return [None]
        values += value if isinstance(value, list) else [value]
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _call(value: Any, tools: Sequence[Tool]) -> FunctionCall | None:
    if not isinstance(value, dict) or value.get("name") not in [t.function.name for t in tools]:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    told = json.dumps(arguments, ensure_ascii=False)
    return FunctionCall(value["name"], told) if is_unicode(told) else None  # half of a pair can be spelled, not sent


def certain_text(text: str) -> int:
    """How many characters of an answer so far are text, whatever follows: from there on a call may have begun."""
    if re.match(r"\s*(?:\{|\[\s*(?:\{|$))", text):
        return 0
    tag = "<tool_call>"
    begun = text.find(tag)
    if begun < 0:
        kept = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
        begun = len(text) - kept
    return len(text[:begun].rstrip())


def begun_call(text: str, ended: bool) -> FunctionCall | None:
    """As much as is certain of a demanded call: its name, and its arguments so far, or all that came when the text has
    `ended`. The last brace of a whole call is not theirs."""
    match = _CALL.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    if not ended:
        return FunctionCall(match[1], rest[:-1].rstrip("} \n"))
    within = rest.rstrip().removesuffix("}").rstrip()
    return FunctionCall(match[1], within if is_json(within) else rest.rstrip())
