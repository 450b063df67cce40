"""What one row of training material says, whatever format it came in.

A row becomes a Record: a conversation to learn the answers of, two answers of which one is better, an answer with a
verdict, or plain text. A new format is one entry in FORMATS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from camelid.tokenizer.template import Message

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "system": "system", "developer": "system", "tool": "tool",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_call": "call",
}  # fmt: skip


REASONING = ("reasoning_content", "reasoning", "thinking")  # what a turn thought before it spoke, as templates name it
CONTEXT = ("input", "context", "passage")  # what a question is about


class BadRow(Exception):
    """Why a row cannot be used, and what would mend it."""


@dataclass(frozen=True)
class Record:
    """One row. `messages` is the conversation; of a preference, what both answers follow, `chosen` and `rejected`;
    of a verdict, the conversation with its answer, and `good`. Plain text has no messages. `format` is its name."""

    format: str
    messages: list[Message] = field(default_factory=list)
    tools: list[Any] | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    good: bool | None = None
    text: str | None = None


def asked_by(one: Record) -> str | None:
    """What a record asks, whatever the answer; None of a plain text, or of a conversation that asks nothing."""
    turns = list(one.messages)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return json.dumps([turns, one.tools], sort_keys=True) if turns else None


Row = Mapping[str, Any]


def record(row: Any) -> Record:
    """Tell a row's format by its fields, and read it. Raises BadRow saying what is missing or out of order."""
    if not isinstance(row, Mapping):
        raise BadRow(f"is a {type(row).__name__}, not an object with fields")
    for name, fields, read in FORMATS:
        if all(row.get(f) is not None for f in fields):
            found = read(row, name)
            if name not in ("preference", "text"):
                found = _judged(found, row)
            check(found)
            return found
    known = "; ".join(f"{name}: {' + '.join(fields)}" for name, fields, _ in FORMATS)
    raise BadRow(f"has the fields {', '.join(map(str, row)) or '(none)'}; camelid reads {known}")


def check(found: Record) -> None:
    """Raise BadRow unless the turns are in an order that can be learned from, and hold text."""
    turns = (*found.messages, *(found.chosen or ()), *(found.rejected or ()))
    try:
        for part in (found.text, found.tools, turns):
            json.dumps(part, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("holds half of a surrogate pair, which is no character: repair the file's encoding") from None
    if found.text is not None:
        return
    endings = [found.messages] if found.chosen is None else [[*found.messages, *found.chosen]]
    endings += [[*found.messages, *found.rejected]] if found.rejected is not None else []
    for conversation in endings:
        _order(conversation)
        last = conversation[-1]["role"]
        if (found.good is not None or found.chosen is not None) and last != "assistant":
            raise BadRow(f"ends with a {last} turn: the answer that is judged comes last")


def _order(messages: Sequence[Message]) -> None:
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role == "system" and before:
            raise BadRow(f"has a system message as turn {number}: put it first")
        if role == "assistant" and before in ("", "system"):
            raise BadRow(f"begins with an assistant turn (turn {number}): put the user's message before it")
        if role == before == "assistant":
            raise BadRow(f"has two assistant turns in a row (turn {number}): join them into one")
        if role == before == "user":
            raise BadRow(f"has two user turns in a row (turn {number}): join them, or add the answer between")
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRow(f"has a tool's result as turn {number} that no assistant turn called for")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"has an empty answer (turn {number}): a model would learn to say nothing")
        before = role
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow("has no assistant turn, so there is nothing to learn from it: add the answer")


def _message(raw: Any) -> Message:
    """A turn in OpenAI's fields or ShareGPT's. Raises BadRow."""
    if not isinstance(raw, Mapping):
        raise BadRow(f"has a turn that is a {type(raw).__name__}, not an object with role and content")
    role, content = raw.get("role", raw.get("from")), raw.get("content", raw.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"has a turn with the role {role!r}; known are {', '.join(ROLES)}")
    if isinstance(content, list):  # OpenAI's parts
        if any(not isinstance(p, Mapping) or not isinstance(p.get("text"), str) for p in content):
            raise BadRow("has a turn with parts that are not text, which a LLaMA cannot read")
        content = "".join(str(p["text"]) for p in content)
    if ROLES[role] == "call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(content)]}
    calls = raw.get("tool_calls")
    if calls and not isinstance(calls, list):
        raise BadRow("has tool_calls that are not a list")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"has a {role} turn whose content is {content!r}, not text")
    message = {"role": ROLES[role], "content": content}
    message |= {key: raw[key] for key in ("name", "tool_call_id", *REASONING) if isinstance(raw.get(key), str)}
    if (weight := raw.get("weight")) is not None:
        if weight not in (0, 1):
            raise BadRow(f"has a turn of weight {weight!r}: 0 is not learned, 1 is, and nothing lies between")
        message["weight"] = weight
    return message | ({"tool_calls": [_call(c) for c in calls]} if calls else {})


def _call(raw: Any) -> dict[str, Any]:
    """A tool call as templates expect it: its arguments an object, not JSON in a string."""
    try:
        call = json.loads(raw) if isinstance(raw, str) else dict(raw)
        function = dict(call.get("function", call))
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"])
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        said = {"name": function["name"], "arguments": function.get("arguments", {})}
        return {**named, "type": "function", "function": said}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadRow("has a tool call without a name and JSON arguments") from None


def _turns(raw: Any) -> list[Message]:
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise BadRow(f"has {type(raw).__name__} where a list of turns belongs, or an empty one")
    return [_message(turn) for turn in raw]


def _said(raw: Any, role: str) -> list[Message]:
    """A text, one turn or several, as turns."""
    if isinstance(raw, str):
        return [{"role": role, "content": raw}]
    return [_message(raw)] if isinstance(raw, Mapping) else _turns(raw)


def _tools(row: Row) -> list[Any] | None:
    raw = row.get("tools") or row.get("functions")
    if not raw:
        return None
    try:
        tools = json.loads(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list):
        raise BadRow("has tools that are not a JSON list")
    return tools


def _opening(row: Row) -> list[Message]:
    system = row.get("system") or row.get("system_prompt")
    return [{"role": "system", "content": system}] if isinstance(system, str) else []


def _asked(row: Row, key: str) -> list[Message]:
    """What comes before the answer, by the field that the format has for it. What an instruction works on follows it,
    what a question is about stands before it."""
    before = _said(row[key], "user") if row.get(key) else []
    lost = {"question": ("choices", "options", "history"), "instruction": ("choices", "options")}.get(key, ())
    if aside := next((field for field in lost if row.get(field)), None):
        raise BadRow(f"has {aside} beside its {key}, which would not be read: write them into the {key}, or the row as "
                     "messages")  # fmt: skip
    if key in ("instruction", "question") and isinstance(row.get(key), str):
        about = "\n\n".join(filter(None, (_text_of(row, field) for field in CONTEXT)))
        parts = (row[key], about) if key == "instruction" else (about, row[key])
        before = [{"role": "user", "content": "\n\n".join(filter(None, parts))}]
    return before if not before or before[0]["role"] == "system" else [*_opening(row), *before]


def _text_of(row: Row, key: str) -> str:
    """A field's text; "" where a row has none, as tables of others' say it: null, or no number. Raises BadRow."""
    value = row.get(key)
    if value is None or value is False or value != value or value in ([], {}):
        return ""
    if not isinstance(value, str):
        raise BadRow(f"has {key} {value!r:.60}, which is no text: write it as the model is to read it")
    return value


def _messages(row: Row, name: str) -> Record:
    turns = _turns(row["messages" if name == "messages" else "conversations"])
    return Record(name, turns if turns[0]["role"] == "system" else [*_opening(row), *turns], _tools(row))


def _with_history(row: Row, before: list[Message]) -> list[Message]:
    """Earlier questions and answers (Alpaca's `history`) between the system message and the question."""
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(h, list | tuple) and len(h) == 2 for h in history)
    if not pairs or not all(isinstance(said, str) for pair in history for said in pair):
        raise BadRow("has a history that is not a list of [question, answer]")
    earlier: list[Message] = [
        m
        for asked, said in history
        for m in ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
    ]
    opening = [m for m in before if m["role"] == "system"]
    return [*opening, *earlier, *before[len(opening) :]]


def _instruction(answer: str) -> Callable[[Row, str], Record]:
    return lambda row, name: Record(
        name, [*_with_history(row, _asked(row, "instruction")), *_said(row[answer], "assistant")]
    )


def _completion(row: Row, name: str) -> Record:
    return Record(name, [*_asked(row, "prompt"), *_said(row["completion"], "assistant")], _tools(row))


def _question(row: Row, name: str) -> Record:
    return Record(name, [*_asked(row, "question"), *_said(row["answer"], "assistant")], _tools(row))


def _preference(row: Row, name: str) -> Record:
    chosen, rejected = _said(row["chosen"], "assistant"), _said(row["rejected"], "assistant")
    if chosen[0]["role"] != "assistant":  # both answers carry the conversation that they share
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        before, chosen, rejected = list(chosen[:same]), chosen[same:], rejected[same:]
        before = before if before[:1] and before[0]["role"] == "system" else [*_opening(row), *before]
    else:
        key = next((k for k in ("prompt", "conversations", "messages", "question", "instruction") if row.get(k)), "")
        before = _asked(row, key) if key else []
        before = _with_history(row, before) if key == "instruction" else before
    if not any(message["role"] != "system" for message in before):
        raise BadRow("has chosen and rejected, but no prompt that both answer")
    if chosen == rejected:
        raise BadRow("has the same answer as chosen and as rejected: there is nothing to prefer")
    return Record(name, before, _tools(row), chosen=chosen, rejected=rejected)


def _judged(found: Record, row: Row) -> Record:
    """The record with its verdict, if the row has one: KTO's rows come in every format of a conversation. A label that
    is neither true nor false is of something else."""
    for key in ("label", "kto_tag"):
        if isinstance(row.get(key), bool):
            return replace(found, format=f"{found.format}, judged", good=row[key])
    return found


def _text(row: Row, name: str) -> Record:
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise BadRow("has an empty text")
    return Record(name, text=row["text"])


# Name, the fields that tell it, its reader: the first whose fields are all there is taken.
FORMATS: list[tuple[str, tuple[str, ...], Callable[[Row, str], Record]]] = [
    ("preference", ("chosen", "rejected"), _preference),
    ("messages", ("messages",), _messages),
    ("sharegpt", ("conversations",), _messages),
    ("alpaca", ("instruction", "output"), _instruction("output")),
    ("dolly", ("instruction", "response"), _instruction("response")),
    ("prompt and completion", ("prompt", "completion"), _completion),
    ("question and answer", ("question", "answer"), _question),
    ("text", ("text",), _text),
]
