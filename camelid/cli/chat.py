"""Talk to a model in the terminal.

/reset begins anew, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer. Without a terminal, each line of stdin is one
message.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from camelid.cli import settings
from camelid.cli.generate import open_engine, sampling, sampling_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--system", help="instructions that precede the conversation")
    sampling_arguments(parser, temperature=0.6, min_p=0.1)  # a small model's rare tokens are noise
    settings.example(parser, 'camelid chat runs/sft --system "Answer in one sentence." --seed 1')


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    params = sampling(options)
    from camelid.errors import InputError

    engine = open_engine(options)
    assert engine.tokenizer is not None
    if engine.tokenizer.chat_template is None:
        raise InputError(f"{options.model} has no chat template: it completes text, use `camelid generate`")
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(opening)
    ask = _reader()
    if sys.stdin.isatty():
        print(f"{options.model}: /reset begins anew, /quit leaves", file=sys.stderr)
    while (said := ask()) is not None and said.strip() != "/quit":
        if said.strip() == "/reset":
            messages = list(opening)
        elif said.strip():
            messages.append({"role": "user", "content": said})
            try:
                answer = _answer(engine, messages, params, quiet=options.json)
            except InputError as error:
                messages.pop()
                print(f"camelid: {error} (/reset begins anew)", file=sys.stderr)
                continue
            messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def _answer(engine: Any, messages: list[dict[str, str]], params: Any, quiet: bool) -> str:
    pieces: list[str] = []
    try:
        for piece in engine.stream(engine.tokenizer.apply_chat_template(messages), params):
            pieces.append(piece)
            if not quiet:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:  # stop the answer, not the chat
        pieces.append(" …")
    if not quiet:
        print()
    return "".join(pieces)


def _reader() -> Callable[[], str | None]:
    """Asks for the next message; None at the end. With prompt_toolkit: line editing and history."""

    def plain() -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return None

    if not sys.stdin.isatty():
        return plain
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return plain
    session: PromptSession[str] = PromptSession()

    def edited() -> str | None:
        try:
            return session.prompt("> ")
        except (EOFError, KeyboardInterrupt):
            return None

    return edited
