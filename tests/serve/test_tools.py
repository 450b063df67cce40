"""Calls of functions in what a model writes, as models write them, whole and piece by piece."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camelid.generate.constrain import Matcher
from camelid.serve.chat import _Writer
from camelid.serve.requests import ChatRequest, read
from camelid.serve.tools import begun_call, form, messages, offered, read_calls
from camelid.serve.worker import Progress
from camelid.tokenizer.tokenizer import Tokenizer

PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "北京"}}'
CLOCK = '{"name": "clock", "arguments": {}}'
NAMES = ("weather", "clock")


def request(**more: Any) -> ChatRequest:
    tools = [{"type": "function", "function": {"name": name}} for name in NAMES]
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "tools": tools}
    return read(ChatRequest, body | more)


TOOLS = offered(request())


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        (PARIS, "", "weather"),
        (f" {LLAMA}\n", "", "weather"),
        (f"{PARIS}\n{CLOCK}", "", "weather clock"),
        (f"{PARIS}; {LLAMA};{CLOCK}", "", "weather weather clock"),
        (f"[{PARIS}, {CLOCK}]", "", "weather clock"),
        (f"<tool_call>\n{PARIS}\n</tool_call>", "", "weather"),
        (f"<tool_call>{PARIS}</tool_call>\n<tool_call>{CLOCK}</tool_call>", "", "weather clock"),
        (f"Let me look.\n\n<tool_call>{CLOCK}</tool_call>", "Let me look.", "clock"),
        (f"<tool_call>{CLOCK}</tool_call>\nLet me look.", "", "clock"),
        (f"<tool_call>{CLOCK}", "", "clock"),
        ('{"name": "clock", "arguments": {"t": "write <tool_call> and ; [tags]"}}', "", "clock"),
        # text
        ("[1] The first", "[1] The first", ""),
        ("It is 1 < 2 in {Paris}.", "It is 1 < 2 in {Paris}.", ""),
        (f"I would write {PARIS} here.", f"I would write {PARIS} here.", ""),
        (f"{PARIS} is a call", f"{PARIS} is a call", ""),
        (PARIS.replace("weather", "unknown"), PARIS.replace("weather", "unknown"), ""),
        (f"{PARIS}\n{PARIS[:-5]}", f"{PARIS}\n{PARIS[:-5]}", ""),
        ('{"name": "weather", "arguments": "Paris"}', '{"name": "weather", "arguments": "Paris"}', ""),
        ("[]", "[]", ""),
        ("<tool_call></tool_call>", "<tool_call></tool_call>", ""),
        ("[" * 100_000, "[" * 100_000, ""),
        ("", "", ""),
        # what Python spells and JSON does not, and what cannot be sent
        ('{"name": "clock", "arguments": {"t": 1e999}}', '{"name": "clock", "arguments": {"t": 1e999}}', ""),
        ('{"name": "clock", "arguments": {"t": NaN}}', '{"name": "clock", "arguments": {"t": NaN}}', ""),
        ('{"name": "clock", "arguments": {"t": "\\ud83d"}}', '{"name": "clock", "arguments": {"t": "\\ud83d"}}', ""),
        ('{"name": "clock", "arguments": {"t": "\\ud83d\\ude00"}}', "", "clock"),
    ],
)
def test_calls_as_models_write_them(text: str, said: str, names: str) -> None:
    found, calls = read_calls(text, TOOLS)
    assert (found, " ".join(call.name for call in calls)) == (said, names)


def test_one_at_a_time() -> None:
    assert [call.name for call in read_calls(f"{CLOCK}\n{PARIS}", TOOLS, one=True)[1]] == ["clock"]
    writer = _Writer(request(parallel_tool_calls=False), TOOLS)
    deltas, reason = writer.deltas(Progress(f"{CLOCK}\n{PARIS}", 9, "eos"))
    assert ([d["tool_calls"][0]["function"]["name"] for d in deltas], reason) == (["clock"], "tool_calls")


PIECES = [
    "Let me look.",
    " ",
    "\n",
    "<",
    "<tool",
    "<tool_call>",
    "</tool_call>",
    PARIS,
    LLAMA,
    CLOCK,
    ";",
    "[",
    "]",
    "{",
]


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.data())
def test_piece_by_piece_is_the_whole(text: str, data: st.DataObject) -> None:
    """Wherever the stream is cut, its text and calls are those of the whole answer, and no text is taken back."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    writer = _Writer(request(), TOOLS)
    told, calls, reason = "", [], None
    for tokens, end in enumerate([*cuts, len(text)]):
        deltas, reason = writer.deltas(Progress(text[:end], tokens, "eos" if tokens == len(cuts) else None))
        for delta in deltas:
            told += delta.get("content", "")
            calls += [call["function"] for call in delta.get("tool_calls", [])]
    said, wanted = read_calls(text, TOOLS)
    assert (told, calls) == (said, [vars(call) for call in wanted])
    assert reason == ("tool_calls" if wanted else "stop")
    assert all(isinstance(json.loads(call["arguments"]), dict) for call in calls)


def test_what_an_argument_says_is_kept() -> None:
    [call] = read_calls('{"name": "clock", "arguments": {"t": "a <tool_call> b"}}', TOOLS)[1]
    assert json.loads(call.arguments) == {"t": "a <tool_call> b"}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "clock", "arguments": {"a": "f', '{"a": "f'),
        ('{"name": "clock", "arguments": {"a": 1}', '{"a": 1}'),
        ('{"name": "clock", "arguments": {"a": 1}}', '{"a": 1}'),
        ('{"name": "clock", "arguments": ', ""),
    ],
)
def test_a_demanded_call_that_was_cut_off(text: str, arguments: str) -> None:
    """All that came of it, whole or streamed."""
    demanded = request(tool_choice="required")
    writer, told = _Writer(demanded, TOOLS), ""
    for end in (10, 40, len(text) - 1, len(text)):
        deltas, reason = writer.deltas(Progress(text[:end], end, "max_new_tokens" if end == len(text) else None))
        told += "".join(d["tool_calls"][0]["function"]["arguments"] for d in deltas)
    assert (told, reason) == (arguments, "length")
    call = begun_call(text, ended=True)
    assert call is not None
    assert (call.name, call.arguments) == ("clock", arguments)


def test_a_second_call_that_was_cut_off_is_told() -> None:
    text = f'<tool_call>{CLOCK}</tool_call>\n<tool_call>{{"name": "clo'
    deltas, reason = _Writer(request(), TOOLS).deltas(Progress(text, 30, "max_new_tokens"))
    assert ([d["tool_calls"][0]["function"]["name"] for d in deltas], reason) == (["clock"], "length")
    assert _Writer(request(), TOOLS).deltas(Progress(text, 30, "eos"))[1] == "tool_calls"


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        (
            {"properties": {"name": {"type": "string"}, "other": {"$ref": "#/properties/name"}}},
            '{"name":"a","other":"b"}',
            '{"name":"a","other":1}',
        ),
        (
            {"properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}, "additionalProperties": False},
            '{"kids":[{"kids":[]}]}',
            '{"kids":[{"name":"clock"}]}',
        ),
        ({"properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "integer"}}}, '{"p":3}', '{"p":"x"}'),
        ({"properties": {"p": {"const": {"$ref": "#"}}}}, '{"p":{"$ref":"#"}}', '{"p":{"$ref":"#/$defs/1"}}'),
        ({"properties": {"p": {"$ref": "#/definitions/P"}}, "definitions": {"P": {"type": "null"}}},
         '{"p":null}', '{"p":1}'),
        ({"properties": {"default": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "integer"}}},
         '{"default":3}', '{"default":"x"}'),
    ],
)  # fmt: skip
def test_references_in_a_demanded_call_are_the_functions_own(
    chat_tokenizer: Tokenizer, parameters: dict[str, Any], good: str, bad: str
) -> None:
    function = {"name": "clock", "parameters": {"type": "object", **parameters}}
    other = {"name": "other", "parameters": {"type": "object", "properties": {"p": {"type": "boolean"}}}}
    tools = offered(request(tools=[{"type": "function", "function": one} for one in (other, function)]))

    def fits(arguments: str) -> bool:
        matcher = Matcher(form(tools), chat_tokenizer, len(chat_tokenizer), [chat_tokenizer.eos_token_id or 0])
        for token in chat_tokenizer.encode(f'{{"name":"clock","arguments":{arguments}}}', add_special_tokens=False):
            if not matcher.allowed()[token]:
                return False
            matcher.take(token)
        return True

    assert fits(good)
    assert not fits(bad)


def test_a_footnote_is_streamed() -> None:
    writer = _Writer(request(), TOOLS)
    assert writer.deltas(Progress("[", 1)) == ([], None)
    assert writer.deltas(Progress("[1] The", 3)) == ([{"content": "[1] The"}], None)


def test_several_results_are_one_turn_of_a_template_that_knows_no_tools() -> None:
    """Llama 2's wants a person and the model to take turns, and several calls are answered by several results."""
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "clock", "arguments": "{}"}} for n in (1, 2)]
    said = [
        {"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "tool", "tool_call_id": "c2", "content": "one"},
        {"role": "assistant", "content": "so"}, {"role": "user", "content": "and?"},
    ]  # fmt: skip
    told = messages(request(messages=said).messages, [], "{{ messages }}")
    assert [one["role"] for one in told] == ["user", "assistant", "user", "assistant", "user"]
    assert told[2]["content"] == "Result of the function: noon\nResult of the function: one"
    assert len(messages(request(messages=said).messages, [], "{{ tools }}")) == 6
