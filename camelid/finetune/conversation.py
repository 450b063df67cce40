"""A record as token ids, and which of them are learned: the answers, with the token that ends them, and nothing else.

Which tokens are the answer is found by rendering: the conversation up to the turn, with the template's own generation
prompt, must be a prefix of the conversation with the turn. A template for which it is not, or which leaves a turn out
or an answer open, is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from camelid.errors import FormatError, InputError
from camelid.finetune.records import REASONING, BadRow, Record
from camelid.tokenizer.template import Message
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import IGNORE


@dataclass(frozen=True)
class Example:
    """Token ids of one document, and labels: the same ids where they are learned, IGNORE elsewhere."""

    ids: list[int]
    labels: list[int]

    def learned(self) -> int:
        """How many tokens are learned; the first cannot be, nothing predicts it."""
        return sum(label != IGNORE for label in self.labels[1:])


class Encoder:
    """Encodes records by a tokenizer's chat template; remembers which sequences of roles the template renders."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._rendered: dict[tuple[Any, ...], str | None] = {}

    def document(self, found: Record) -> Example:
        """A conversation or plain text. Raises BadRow for the row's fault, InputError for the template's."""
        if found.text is not None:
            return self.text(found.text)
        return self.conversation(found.messages, found.tools)

    def text(self, text: str) -> Example:
        """BOS, the text, EOS: all of it is learned."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if eos is None:
            raise InputError("the tokenizer has no EOS token: a text would have no end")
        ids = [*([] if bos is None else [bos]), *self.tokenizer.encode(text, False, parse_special=False), eos]
        return Example(ids, [IGNORE, *ids[1:]])

    def conversation(self, messages: Sequence[Message], tools: list[Any] | None = None, since: int = 0) -> Example:
        """Every assistant turn from turn `since` on is learned but those of weight 0. Texts are stripped of blanks
        around them."""
        answers = [n for n, m in enumerate(messages) if m["role"] == "assistant" and n >= since]
        if not answers:
            raise BadRow("has no assistant turn, so there is nothing to learn from it: add the answer")
        answers = [n for n in answers if messages[n].get("weight") != 0]
        if not answers:
            raise BadRow("has no answer to learn from: each has the weight 0")
        messages = [{k: v for k, v in m.items() if k != "weight"} | {"content": m["content"].strip()} for m in messages]
        self.check_roles(messages, tools)
        spans = self._spans(messages, tools, answers)
        ids: list[int] = []
        labels: list[int] = []
        for piece, learned in spans:
            ids += piece
            labels += piece if learned else [IGNORE] * len(piece)
        if all(label != IGNORE for label in labels):
            raise InputError(
                "the chat template renders answers only: no token of a question is left out of the loss. "
                "Set finetune.template to one that renders both"
            )
        return Example(ids, labels)

    def _spans(
        self, messages: list[Message], tools: list[Any] | None, answers: Sequence[int]
    ) -> list[tuple[list[int], bool]]:
        """The conversation's ids in pieces, each with whether it is learned."""
        chat = self.tokenizer.chat
        try:
            whole = chat(messages, tools=tools)
            ends = [
                (chat(messages[:n], tools=tools, add_generation_prompt=True), chat(messages[: n + 1], tools=tools))
                for n in answers
            ]
        except FormatError as error:
            raise BadRow(f"is refused by the chat template: {error}") from None
        cuts, at = [], 0
        for number, (before, through) in zip(answers, ends, strict=True):
            if not (through.startswith(before) and whole.startswith(through)):
                raise InputError(
                    "the chat template does not render a conversation as a prefix of its continuation, so the "
                    f"answer's tokens cannot be told from the question's (turn {number + 1}). Set finetune.template "
                    "to one that does, such as chatml"
                )
            _check_whole(messages[number], number + 1, through[len(before) :])
            cuts += [(before[at:], False), (through[len(before) :], True)]
            at = len(through)
        cuts.append((whole[at:], False))
        return self._encoded(cuts)

    def _encoded(self, cuts: list[tuple[str, bool]]) -> list[tuple[list[int], bool]]:
        """Ids of the pieces: those of the whole text where its tokens end at the cuts, else piece by piece, as they are
        when a model answers: a token never holds the end of a question and the beginning of its answer."""
        encode, control = self.tokenizer.encode_chat, self.tokenizer.special_tokens
        ids, found, at = encode("".join(text for text, _ in cuts)), [], 0
        upto = ""
        for text, learned in cuts:
            upto += text
            prefix = encode(upto)
            if ids[: len(prefix)] != prefix:
                found = [(encode(t, continuing=n > 0), w) for n, (t, w) in enumerate(cuts)]
                break
            found.append((ids[at : len(prefix)], learned))
            at = len(prefix)
        ended: list[tuple[list[int], bool]] = []
        for piece, learned in found:
            # What the template writes after the answer's end (a line break) is never asked of a model.
            size = max((n + 1 for n, i in enumerate(piece) if i in control), default=0) if learned else 0
            if learned and not size:
                raise InputError(
                    "the chat template does not end an answer with a control token, so a model that learns from it "
                    "would never stop. Set finetune.template to one that does, such as chatml"
                )
            ended += [(piece[:size], True), (piece[size:], False)] if learned else [(piece, False)]
        return ended

    def check_roles(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        """Raise BadRow when the template would leave out a turn, a call or the tools: seen by words put there."""
        shape = (*((m["role"], bool(m["content"]), len(m.get("tool_calls", ()))) for m in messages), bool(tools))
        if shape not in self._rendered:
            self._rendered[shape] = self._missing(messages, bool(tools))
        if missing := self._rendered[shape]:
            raise BadRow(
                f"needs a chat template that renders {missing}; this one leaves it out or refuses it. "
                "Set finetune.template, or take it out of the data"
            )

    def _missing(self, messages: Sequence[Message], tools: bool) -> str | None:
        marked: list[Message] = []
        words: list[tuple[str, str]] = []
        for number, message in enumerate(messages):
            probe: dict[str, Any] = {"role": message["role"], "content": f"camelidturn{number}x"}
            if calls := message.get("tool_calls"):
                probe["content"] = message["content"] and probe["content"]
                names = [f"camelidcall{number}n{k}x" for k in range(len(calls))]
                probe["tool_calls"] = [{"type": "function", "function": {"name": n, "arguments": {}}} for n in names]
                words += [(name, "tool calls") for name in names]
            if probe["content"]:
                words.append((probe["content"], f"the role {message['role']}"))
            marked.append(probe)
        function = {"name": "camelidtoolx", "description": "", "parameters": {"type": "object", "properties": {}}}
        offered = [{"type": "function", "function": function}] if tools else None
        words += [("camelidtoolx", "tools")] if tools else []
        try:
            text = self.tokenizer.chat(marked, tools=offered)
        except FormatError as error:
            return f"this sequence of roles ({', '.join(m['role'] for m in messages)}: {error})"
        return next((what for word, what in words if word not in text), None)


def _check_whole(message: Message, number: int, rendered: str) -> None:
    """Raise BadRow when a template drops a part of what is to be learned, as some do with <think> … </think>."""
    whole = "".join(rendered.split())  # a template may set its own blanks
    for key in ("content", *REASONING):
        if "".join((message.get(key) or "").split()) not in whole:
            raise BadRow(
                f"has an answer (turn {number}) of whose {key} the chat template leaves out or changes a part, such as "
                "what a model thought: set finetune.template to one that renders it whole, or take it out of the data"
            )


def end_of_turn(example: Example, tokenizer: Tokenizer) -> int | None:
    """The control token that closes an answer: the last one among the learned tokens."""
    special = tokenizer.special_tokens
    return next((i for i in reversed(example.labels) if i in special), None)
