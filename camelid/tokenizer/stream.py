"""Ids to text, one at a time, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camelid.tokenizer.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
MOST_WAITING = 16  # ids, of which none has ended a character: a character has four bytes


class StreamDecoder:
    """`push` ids, get the text they complete; `finish` for what is left. All of it together is the decoded whole, but
    for text that is no UTF-8: there a whole decode may give up more characters than the stream did.

    `before`: the last ids of the prompt, so that the first new word keeps its blank, and a character that the prompt
    ends within is completed. Ids that are no tokens, of a vocabulary that was padded, are no text. Each step decodes a
    few ids only, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip, self._size = tokenizer, skip_special_tokens, len(tokenizer)
        self._context = self._from_whole_character(list(before))  # ids whose text is out
        self._waiting: list[int] = []
        self._within = self._decode(self._context).endswith(UNFINISHED)  # a character, which what comes may complete

    def push(self, token_id: int) -> str:
        """The text that this id completes: nothing while a character is unfinished."""
        self._waiting.append(token_id)
        text = self._text()
        if not text.endswith(UNFINISHED):
            return self._release(text)
        many = len(self._waiting) > MOST_WAITING and len(self._waiting) % 8 == 0
        return self._given_up(text) if many else ""

    def finish(self) -> str:
        """What never became a whole character, as the tokenizer decodes it."""
        return self._release(self._text()) if self._waiting else ""

    def _given_up(self, text: str) -> str:
        """Of bytes that are no character those that can never be a part of one: a model may write them without end, and
        every step would decode them all."""
        waiting = self._waiting
        for cut in range(len(waiting) - 3, len(waiting) - 9, -1):  # what came three ids ago would be whole by now
            self._waiting = waiting[:cut]
            if text.startswith(early := self._text()):
                self._release(early)
                self._waiting = waiting[cut:]
                return early
        self._waiting = waiting  # every token ends a character and begins another
        return ""

    def _text(self) -> str:
        shown = self._decode(self._context)
        whole = self._decode([*self._context, *self._waiting])
        if not whole.startswith(shown):  # the prompt ended within a character that is whole now
            shown = shown.rstrip(UNFINISHED)
        return whole[len(shown) :] if whole.startswith(shown) else self._decode(self._waiting)

    def _release(self, text: str) -> str:
        if text and not self._within:
            self._context = self._waiting
        else:
            self._context = self._from_whole_character([*self._context, *self._waiting][-16:])
        self._waiting, self._within = [], self._within and not text
        return text

    def _from_whole_character(self, ids: list[int]) -> list[int]:
        """Without the end of a character at the front, which would spoil the characters behind it."""
        while ids and self._decode(ids).startswith(UNFINISHED):
            ids = ids[1:]
        return ids

    def _decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i < self._size]
        return self._tokenizer.decode(known, skip_special_tokens=self._skip)
