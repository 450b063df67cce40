"""A conversation in a terminal: what was said, by which settings, and the commands that change either."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from camelid.disk import write_atomic
from camelid.errors import InputError
from camelid.generate.engine import Engine, Result
from camelid.generate.sampling import SamplingParams

Message = dict[str, str]
SETTABLE = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "max_new_tokens", "seed", "lookup",
)  # fmt: skip


class Conversation:
    """Messages and settings. `command` does what a line that begins with / asks for."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None) -> None:
        assert engine.tokenizer is not None
        if engine.tokenizer.chat_template is None:
            raise InputError("the model has no chat template: it completes text, use `camelid generate`")
        self.engine, self.system = engine, system
        self.params = self._unlimited(params)
        self.messages: list[Message] = []
        self.commands: dict[str, tuple[str, Callable[[str], str]]] = {
            "help": ("what there is", self._help),
            "system": ("TEXT: instructions from here on; without a text, show them", self._system),
            "params": ("NAME=VALUE …: change how tokens are chosen; without any, show it", self._params),
            "retry": ("answer the last message again", self._retry),
            "undo": ("take back the last message and its answer", self._undo),
            "reset": ("begin anew", self._reset),
            "save": ("FILE: write the conversation, as one line of a fine-tuning file", self._save),
            "load": ("FILE: go on with a saved conversation", self._load),
            "tokens": ("how much of the context is used", self._tokens),
            "quit": ("leave (or Ctrl-D)", lambda _: ""),
        }

    def say(self, text: str) -> Generator[str, None, Result]:
        """Stream the answer to a message. Closed early, what came is kept as the answer. Raises InputError when the
        model cannot take the message, which is then taken back."""
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def again(self) -> Generator[str, None, Result]:
        """Stream an answer to the last message, which has none."""
        return self._answer(self.messages)

    @property
    def waiting(self) -> bool:
        """Whether the last message has no answer yet."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def ids(self, messages: list[Message]) -> list[int]:
        """The conversation as the model reads it."""
        assert self.engine.tokenizer is not None
        opening = [{"role": "system", "content": self.system}] if self.system else []
        ids: list[int] = self.engine.tokenizer.apply_chat_template([*opening, *messages])
        return ids

    def _answer(self, messages: list[Message]) -> Generator[str, None, Result]:
        stream = self.engine.stream(self.ids(messages), self.params)
        pieces: list[str] = []
        taken = True
        try:
            while True:
                try:
                    piece = next(stream)
                except StopIteration as end:
                    result: Result = end.value
                    return result
                except InputError:
                    taken = False
                    raise
                pieces.append(piece)
                yield piece
        finally:
            stream.close()
            if taken:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def command(self, line: str) -> str:
        """Do what "/name argument" says; returns what there is to tell. Raises InputError."""
        name, _, argument = line[1:].strip().partition(" ")
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            raise InputError(f"there is no /{name}" + (f"; did you mean /{near[0]}?" if near else "; see /help"))
        return self.commands[name][1](argument.strip())

    def _help(self, _: str) -> str:
        lines = [f"/{name:<7} {text}" for name, (text, _) in self.commands.items()]
        return "\n".join(
            [*lines, 'Ctrl-C stops an answer; Alt-Enter begins a new line; """ begins and ends a long text.']
        )

    def _system(self, text: str) -> str:
        if text:
            self.system = text
        return f"system: {self.system or '(none)'}"

    def _params(self, text: str) -> str:
        changes: dict[str, Any] = {}
        for pair in text.split():
            name, equals, value = pair.partition("=")
            if not equals or name not in SETTABLE:
                raise InputError(f"{pair}: give NAME=VALUE, with a name of {', '.join(SETTABLE)}")
            nothing = value == "none" and name in ("seed", "max_new_tokens")
            changes[name] = None if nothing else _number(name, value)
        self.params = self._unlimited(dataclasses.replace(self.params, **changes))
        return "  ".join(f"{name}={getattr(self.params, name)}" for name in SETTABLE)

    def _unlimited(self, params: SamplingParams) -> SamplingParams:
        """A person ends what is too long: without a limit, the whole context is one."""
        if params.max_new_tokens is not None or params.max_length is not None:
            return params
        return dataclasses.replace(params, max_new_tokens=self.engine.context_length)

    def _retry(self, _: str) -> str:
        if not self.messages:
            raise InputError("nothing was said yet")
        if not self.waiting:
            self.messages = self.messages[:-1]
        return ""

    def _undo(self, _: str) -> str:
        if not self.messages:
            raise InputError("nothing was said yet")
        kept = self.messages[:-1] if self.waiting else self.messages[:-2]
        self.messages = kept
        return f"{len(kept)} messages are left"

    def _reset(self, _: str) -> str:
        self.messages = []
        return "begun anew"

    def _save(self, name: str) -> str:
        if not name:
            raise InputError("/save FILE: say where")
        opening = [{"role": "system", "content": self.system}] if self.system else []
        path = _place(name)
        if path.exists():
            raise InputError(f"{path} is there already")
        try:
            write_atomic(path, json.dumps({"messages": [*opening, *self.messages]}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
        return f"{len(self.messages)} messages in {path}"

    def _load(self, name: str) -> str:
        path = _place(name)
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
            found = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: no conversation can be read from it: {error}") from None
        first = found[:1] if found and found[0]["role"] == "system" else []
        self.ids(found[len(first) :] or found)  # the template must take it
        self.system = first[0]["content"] if first else self.system
        self.messages = found[len(first) :]
        return f"{len(self.messages)} messages"

    def _tokens(self, _: str) -> str:
        used, most = len(self.ids(self.messages)) if self.messages else 0, self.engine.context_length
        return f"{used:,} of {most:,} tokens of the context are used ({used / most:.0%})"


def _place(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # the home of nobody that is known
        raise InputError(f"{name}: there is no such home") from None


def _number(name: str, value: str) -> int | float:
    kind = typing.get_type_hints(SamplingParams)[name]
    whole = kind is int or int in typing.get_args(kind)
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise InputError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}") from None
