"""The terminal chat: its commands, what stays of an answer that was stopped, and how it works in a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from camelid.errors import InputError
from camelid.generate.engine import Engine, Result
from camelid.generate.sampling import SamplingParams
from camelid.serve import terminal as terminal_room
from camelid.serve.conversation import Conversation
from camelid.serve.terminal import finished


@pytest.fixture
def talk(engine: Engine) -> Conversation:
    return Conversation(engine, SamplingParams(max_new_tokens=6))


def said(talk: Conversation, text: str | None) -> Result:
    stream = talk.again() if text is None else talk.say(text)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def test_an_answer_follows_all_that_was_said(talk: Conversation, engine: Engine) -> None:
    talk.system = "Be brief."
    first = said(talk, "Hello")
    second = said(talk, "And?")
    assert engine.tokenizer is not None
    told = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.text}, {"role": "user", "content": "And?"},
    ]  # fmt: skip
    [wanted] = engine.generate([engine.tokenizer.apply_chat_template(told)], SamplingParams(max_new_tokens=6))
    assert second.text == wanted.text
    assert talk.messages == [*told[1:], {"role": "assistant", "content": second.text}]


def test_what_came_of_a_stopped_answer_stays(talk: Conversation, engine: Engine) -> None:
    assert f"max_new_tokens={talk.engine.context_length}" in talk.command("/params max_new_tokens=none")
    talk.command("/params max_new_tokens=200")
    stream = talk.say("Hello")
    piece = next(stream)
    stream.close()
    assert talk.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": piece}]
    assert engine.scheduler.pages.taken == 0


def test_a_message_that_is_too_long_is_taken_back(talk: Conversation) -> None:
    with pytest.raises(InputError, match="at most"):
        said(talk, "word " * 3000)
    assert talk.messages == []


def test_retry_and_undo(talk: Conversation) -> None:
    talk.command("/params temperature=1 seed=1")
    first = said(talk, "Hello")
    talk.command("/params seed=2")
    talk.command("/retry")
    assert talk.waiting
    second = said(talk, None)
    assert second.text != first.text
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.command("/undo") == "0 messages are left"
    for command in ("/undo", "/retry"):
        with pytest.raises(InputError, match="nothing was said"):
            talk.command(command)


def test_a_saved_conversation_goes_on_and_is_fine_tuning_data(
    talk: Conversation, engine: Engine, tmp_path: Path
) -> None:
    talk.command("/system Be brief. 简短")
    said(talk, "Hello")
    talk.command(f"/save {tmp_path}/talk.jsonl")
    with pytest.raises(InputError, match="there already"):
        talk.command(f"/save {tmp_path}/talk.jsonl")
    other = Conversation(engine, talk.params)
    assert other.command(f"/load {tmp_path}/talk.jsonl") == "2 messages"
    assert (other.messages, other.system) == (talk.messages, "Be brief. 简短")
    assert said(other, "And?").text == said(talk, "And?").text
    rows = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/parms", "did you mean /params"),
        ("/xyzzy", "see /help"),
        ("/params heat=1", "NAME=VALUE"),
        ("/params temperature=hot", "must be a number"),
        ("/params seed=1.5", "whole number"),
        ("/params top_p=2", "between 0 and 1"),
        ("/save", "say where"),
        ("/load /nonexistent", "no conversation can be read"),
        ("/save /nonexistent/x.json", "cannot be written"),
        ("/save ~nobody-of-this-name/x", "there is no such home"),
        ("/load ~nobody-of-this-name/x", "there is no such home"),
    ],
)
def test_what_a_command_refuses(talk: Conversation, command: str, told: str) -> None:
    before = talk.params
    with pytest.raises(InputError, match=told):
        talk.command(command)
    assert talk.params == before


def test_tokens_and_help(talk: Conversation) -> None:
    assert "0 of 1,024" in talk.command("/tokens")
    said(talk, "Hello")
    assert f"{len(talk.ids(talk.messages))} of 1,024" in talk.command("/tokens")
    for name in talk.commands:
        assert f"/{name}" in talk.command("/help")


def test_paragraphs_that_are_finished() -> None:
    assert finished("a\nb") == 0
    assert finished("a\n\nb") == 3
    assert finished("a\n\n```\nx\n\ny\n") == 3
    assert finished("```\nx\n\n```\n\nb") == len("```\nx\n\n```\n\n")
    assert finished("a\nb\nc", by_line=True) == 4
    assert finished("a\n```\nb\nc", by_line=True) == 2


@pytest.mark.parametrize("leave", ["/quit", "/exit"])
def test_in_a_pipe_each_line_is_a_message(folder: Path, leave: str) -> None:
    command = [sys.executable, "-m", "camelid", "chat", str(folder), "--max-new-tokens", "5", "--temperature", "0"]
    text = f"Hello\n/tokens\n/nothing\nAnd?\n{leave}\nnever\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "tokens of the context are used" in done.stderr
    assert "there is no /nothing" in done.stderr
    assert "\033" not in done.stdout
    told = subprocess.run([*command, "--json"], input=text, capture_output=True, text=True, timeout=60)
    messages = json.loads(told.stdout)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert done.stdout == "".join(f"{m['content']}\n" for m in messages[1::2])


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
def test_a_terminal_is_left_alone_while_an_answer_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C there would throw away what is not drawn yet, and an old drawing would stay on the screen."""
    import pty
    import termios

    outer, inner = pty.openpty()
    with open(inner, encoding="utf-8") as terminal, open(outer, "rb", buffering=0):
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(terminal)
        with terminal_room._undisturbed(True):
            flags = termios.tcgetattr(terminal)[3]
            assert flags & termios.NOFLSH
            assert not flags & termios.ECHO
        assert termios.tcgetattr(terminal) == before
