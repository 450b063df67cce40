"""The terminal's side of a chat: asking for a message, showing an answer as it comes. Without a terminal each line of
stdin is one message and answers are plain text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

from camelid.errors import CamelidError
from camelid.generate.engine import Result
from camelid.serve.conversation import Conversation

QUOTE = '"""'
LEAVES = ("/quit", "/exit", "/bye")  # the last two are what other chats take


def talk(conversation: Conversation, quiet: bool = False) -> None:
    """Ask and answer until the end of input or /quit. `quiet` prints no answers."""
    fancy = sys.stdin.isatty() and sys.stdout.isatty() and not quiet
    ask = _reader()
    if fancy:
        print("/help shows the commands, /quit leaves", file=sys.stderr)
    while (said := _whole(ask)) is not None:
        line = said.strip()
        if line.split(" ")[0] in LEAVES:
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                told = conversation.command(line)
                if told:
                    print(told, file=sys.stderr)
                if not (line.split(" ")[0] == "/retry" and conversation.waiting):
                    continue
                stream = conversation.again()
            else:
                stream = conversation.say(said)
            _show(conversation, stream, fancy, quiet)
        except CamelidError as error:
            print(f"camelid: {error} (/reset begins anew)", file=sys.stderr)


def _show(conversation: Conversation, stream: Generator[str, None, Result], fancy: bool, quiet: bool) -> None:
    """Print an answer; Ctrl-C ends it, and what came stays."""
    writer: Callable[[str], None] = (lambda _: None) if quiet else _write
    markdown = _Markdown() if fancy else None
    begun, result = time.monotonic(), None
    try:
        with closing(stream), _undisturbed(fancy):
            while True:
                (markdown.add if markdown else writer)(next(stream))
    except StopIteration as end:
        result = end.value
    except KeyboardInterrupt:
        pass
    finally:
        if markdown:
            markdown.finish()
        writer("" if fancy else "\n")
    if fancy:
        if result is None:
            note = "stopped"
        else:
            speed = len(result.ids) / max(1e-9, time.monotonic() - begun)
            used = result.prompt_tokens + len(result.ids)
            note = f"{len(result.ids)} tokens, {speed:.0f} a second; {used:,} of {conversation.engine.context_length:,}"
            note += " (cut: the limit of tokens)" if result.finish_reason.startswith("max") else ""
        print(f"\033[2m[{note}]\033[0m", file=sys.stderr)


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


@contextmanager
def _undisturbed(fancy: bool) -> Iterator[None]:
    """What is typed meanwhile is not shown in the middle of an answer, and Ctrl-C throws none of it away: a terminal
    else drops what it has not drawn yet, cursor movements among it."""
    try:
        import termios
    except ImportError:  # Windows
        fancy = False
    if not fancy:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    changed = termios.tcgetattr(sys.stdin)
    changed[3] = (changed[3] & ~termios.ECHO) | termios.NOFLSH
    termios.tcsetattr(sys.stdin, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class _Markdown:
    """An answer as Markdown while it comes: paragraphs that are finished are printed for good, the last one is drawn
    again and again."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console, self._text, self._done = Console(), "", 0
        self._live = Live(console=self._console, refresh_per_second=12, vertical_overflow="visible")
        self._live.start()

    def add(self, piece: str) -> None:
        self._text += piece
        end = finished(self._text)
        tail = self._text[self._done :]
        if len(tail) // self._console.width + tail.count("\n") > self._console.height // 2:
            # More than a screen could not be drawn again: lines of a long paragraph are then printed for good too.
            end = max(end, finished(self._text, by_line=True))
        if end > self._done:
            self._live.update(self._drawn(""))
            self._console.print(self._drawn(self._text[self._done : end]), "")
            self._done = end
        self._live.update(self._drawn(self._text[self._done :]))

    def finish(self) -> None:
        self._live.stop()

    @staticmethod
    def _drawn(text: str) -> Any:
        from rich.markdown import Markdown

        return Markdown(text)


def finished(text: str, by_line: bool = False) -> int:
    """Where the last paragraph (or line) of a text begins: what is before it changes no more. Code is one paragraph."""
    end = at = 0
    fenced = False
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and (not line.strip() or (by_line and line.endswith("\n"))):
            end = at
    return end


def _whole(ask: Callable[[str], str | None]) -> str | None:
    """One message: a line, or what stands between two lines that begin and end with three quotes."""
    line = ask("> ")
    if line is None or not line.strip().startswith(QUOTE) or not sys.stdin.isatty():
        return line
    lines = [line.strip()[len(QUOTE) :]]
    while not lines[-1].rstrip().endswith(QUOTE):
        more = ask("… ")
        if more is None:
            return None
        lines.append(more)
    lines[-1] = lines[-1].rstrip()[: -len(QUOTE)]
    return "\n".join(lines)


def _reader() -> Callable[[str], str | None]:
    """Asks for a line; None at the end. With prompt_toolkit: editing, history, new lines by Alt-Enter."""

    def plain(mark: str) -> str | None:
        try:
            return input(mark if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return None

    if not sys.stdin.isatty():
        return plain
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        return plain
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(key_bindings=keys)

    def edited(mark: str) -> str | None:
        while True:
            try:
                return session.prompt(mark)
            except KeyboardInterrupt:  # a line given up, not the chat
                continue
            except EOFError:
                return None

    return edited
