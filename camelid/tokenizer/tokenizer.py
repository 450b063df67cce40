"""The one tokenizer: text to ids and back, over the `tokenizers` library, plus special ids and a chat template."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from camelid.disk import write_file
from camelid.errors import FormatError, InputError
from camelid.kernels.bpe import NativeBpe, grouped
from camelid.tokenizer import sentencepiece_model as spm
from camelid.tokenizer.native import bytes_of, native_bpe
from camelid.tokenizer.template import Guard, Message, render

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as Backend


LONGEST_KEPT = 2048  # characters of a part of a conversation whose ids are kept


class Tokenizer:
    """Encodes and decodes. `bos_token_id`, `eos_token_id`, `pad_token_id` are None where the model has none."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.chat_template = chat_template
        self.model_file: bytes | None = None  # SentencePiece's, beside which it lay: kept for llama.cpp's converter
        self.renderer: Callable[..., str] = render  # a server has it done in a process that can be killed
        self._lock = Lock()  # whether control tokens are parsed is a state of the backend
        self._special = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}

    def __repr__(self) -> str:
        kind = "byte-level" if self._is_byte_level else "SentencePiece"
        ends = ", ".join(
            f"{name} {self.token(i)!r}"
            for name, i in (("bos", self.bos_token_id), ("eos", self.eos_token_id))
            if i is not None
        )
        template = "with" if self.chat_template else "without"
        return f"Tokenizer({len(self):,} tokens, {kind}, {ends or 'no bos, no eos'}, {template} a chat template)"

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: the rows an embedding needs at least."""
        return len(self)

    def check_rows(self, rows: int, where: object) -> None:
        """Raise InputError when an embedding of so many rows has none for some token."""
        if len(self) > rows:
            raise InputError(
                f"{where}: the tokenizer has {len(self)} tokens but the embedding only {rows} rows (vocab_size in "
                "config.json): they do not belong together"
            )

    @property
    def special_tokens(self) -> dict[int, str]:
        """Control tokens by id; `decode(skip_special_tokens=True)` leaves them out."""
        return dict(self._special)

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        parse_special: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> Any:
        """Text to ids: a list, or an int64 tensor [1, seq] with return_tensors="pt".

        add_special_tokens puts the BOS (or whatever the model's own rule is) around the text. parse_special=False
        reads "<s>" in the text as characters: right for documents and for anything a stranger wrote. truncation=True
        cuts a text's end off so that no more than max_length ids are left, those around it included.
        """
        if truncation != (max_length is not None) or (truncation and not (type(max_length) is int and max_length > 0)):
            raise InputError("to cut texts, say both: truncation=True and max_length, 1 or more tokens")
        with self._lock, _faults_told():
            self.backend.encode_special_tokens = not parse_special
            if max_length is not None:
                self.backend.enable_truncation(max_length)
            try:
                # A batch of one: while it is cut, Python's other threads go on.
                [found] = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
            finally:
                if max_length is not None:
                    self.backend.no_truncation()
        ids: list[int] = found.ids
        if max_length is not None and len(ids) > max_length:
            raise InputError(f"max_length {max_length} leaves no room for the tokens around a text")
        return ids if return_tensors is None else _as([ids], return_tensors)

    def encode_prompt(self, text: str, parse_special: bool = True) -> list[int]:
        """Ids of a text that goes on: as `encode`, but for what some tokenizers put behind a text that has ended."""
        ids: list[int] = self.encode(text, parse_special=parse_special)
        return ids[: len(ids) - self._behind]

    @cached_property
    def _behind(self) -> int:
        with self._lock:
            mask = self.backend.encode("a").special_tokens_mask
        return next((n for n, put in enumerate(reversed(mask)) if not put), 0)

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Many texts at once, on all cores, without special tokens and with none parsed.

        Returns the ids end to end, uint32, and where each text's begin, int64 [texts + 1]. The native library does it
        for the pipelines it knows, `tokenizers` for all others; the ids are the same.
        """
        native = self._native
        if native is None or self._holds_added(texts):
            return self._encode_batch_reference(texts)
        with _faults_told():
            return native.encode(texts)

    def encode_stream(self, texts: Iterable[str]) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        """`encode_batch` of any number of texts, some hundreds at a time."""
        for group in grouped(texts):
            yield self.encode_batch(group)

    def _encode_batch_reference(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        with self._lock, _faults_told():
            self.backend.encode_special_tokens = True
            found = [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        offsets = np.zeros(len(found) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in found], out=offsets[1:])
        return np.fromiter(itertools.chain.from_iterable(found), np.uint32, int(offsets[-1])), offsets

    @cached_property
    def _native(self) -> NativeBpe | None:
        return native_bpe(json.loads(self.backend.to_str()))

    @cached_property
    def _parsed_anyway(self) -> list[str]:
        """Added tokens that are not control tokens: the library finds them in any text, whatever it is told."""
        added = [t for t in self.backend.get_added_tokens_decoder().values() if not t.special]
        return [t.content.replace("▁", " ") for t in added]

    def _holds_added(self, texts: Sequence[str]) -> bool:
        if not self._parsed_anyway:
            return False
        plain = (text.replace("▁", " ") for text in texts)
        return any(token in text for text in plain for token in self._parsed_anyway)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` as one list a text."""
        ids, offsets = self.encode_batch(texts)
        return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]

    def decode(self, ids: Iterable[int] | torch.Tensor, skip_special_tokens: bool = False) -> str:
        """Ids to text. Raises InputError for an id outside the vocabulary."""
        numbers, size = [int(i) for i in ids], len(self)
        for number in numbers:
            if not 0 <= number < size:
                raise InputError(f"token id {number} is outside the vocabulary of {size}")
        text: str = self.backend.decode(numbers, skip_special_tokens=skip_special_tokens)
        return text

    def offsets(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) of every token of a text, in characters of it; nothing is parsed or added.

        Tokens that share a character (the bytes of an emoji) share its place.
        """
        with self._lock, _faults_told():
            self.backend.encode_special_tokens = True
            found = self.backend.encode(text, add_special_tokens=False)
        return [(i, start, end) for i, (start, end) in zip(found.ids, found.offsets, strict=True)]

    def token(self, token_id: int) -> str:
        """The vocabulary entry of an id, as stored ("▁the", "Ġthe", "<0x0A>")."""
        return self.backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, which may be part of a character only: of "▁the" the bytes of " the"."""
        name = self.token(token_id)
        if token_id in self._special:
            return name.encode()
        if self._is_byte_level:
            return bytes_of(name) or name.encode()
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
        return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])

    def __call__(
        self,
        text: str | Sequence[str],
        return_tensors: str | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask` (0 where padding stands) of one text, or of each of several: lists, or int64
        [texts, longest] with return_tensors="pt". `padding` fills up to the longest at the left, so that `generate`
        goes on from each text's end. `truncation` with `max_length` cuts, as in `encode`."""
        texts = [text] if isinstance(text, str) else list(text)
        rows: list[list[int]] = [
            self.encode(one, add_special_tokens, truncation=truncation, max_length=max_length) for one in texts
        ]
        longest = max(map(len, rows), default=0)
        if not padding and return_tensors and any(len(row) < longest for row in rows):
            raise InputError("texts of unlike lengths do not fit one tensor: padding=True fills them up")
        fill = next((i for i in (self.pad_token_id, self.eos_token_id) if i is not None), 0)
        short = [longest - len(row) if padding else 0 for row in rows]
        ids = [[fill] * n + row for n, row in zip(short, rows, strict=True)]
        mask = [[0] * n + [1] * len(row) for n, row in zip(short, rows, strict=True)]
        if return_tensors is None and isinstance(text, str):
            return {"input_ids": ids[0], "attention_mask": mask[0]}
        return {"input_ids": _as(ids, return_tensors), "attention_mask": _as(mask, return_tensors)}

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> Any:
        """A conversation as the model was trained to read it: ids, or text with tokenize=False.

        What a person wrote is never a control token in the ids, whatever it spells, and keeps every letter; the text
        alone cannot tell the two apart. Raises InputError when the model has no chat template.
        """
        text = self.chat(messages, add_generation_prompt, tools)
        return self.encode_chat(text) if tokenize else self._guard.show(text)

    def chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """A conversation rendered, for `encode_chat`: what people wrote is marked where it could be taken for control
        tokens. Raises InputError without a chat template, FormatError when the template fails or refuses."""
        if self.chat_template is None:
            raise InputError("the model has no chat template: it completes text (use generate), it does not chat")
        hide = self._guard.hide_in
        # All that transformers' templates find: without tools and documents these are there, and none.
        variables: dict[str, Any] = {"tools": hide(tools) if tools else None, "documents": None}
        names = {"bos_token": self._name(self.bos_token_id), "eos_token": self._name(self.eos_token_id)}
        if self.pad_token_id is not None:
            names["pad_token"] = self._name(self.pad_token_id)
        if unknown := getattr(self.backend.model, "unk_token", None):
            names["unk_token"] = unknown
        return self.renderer(
            self.chat_template, hide(messages), add_generation_prompt=add_generation_prompt, **names, **variables
        )

    def encode_chat(self, text: str, continuing: bool = False) -> list[int]:
        """Ids of a text from `chat`, or of a part of it that goes on (`continuing`)."""
        # The template writes its own BOS where it wants one.
        return self._encode_parts(list(self._guard.cut(text)), continuing)

    @cached_property
    def _guard(self) -> Guard:
        return Guard(self._special.values())

    @cached_property
    def _continuing(self) -> Backend:
        """The pipeline for text that goes on: one that puts a blank before the first word of a text only, does not."""
        description = self.backend.to_str()
        if '"prepend_scheme":"first"' not in description:
            return self.backend
        from tokenizers import Tokenizer as Backend

        return Backend.from_str(description.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))

    def _encode_parts(self, parts: Sequence[tuple[str, bool]], continuing: bool = False) -> list[int]:
        """Ids of (text, is it a control token) in order. A control token may take the blanks beside it with it."""
        flags = self._added
        ids: list[int] = []
        for i, (part, control) in enumerate(parts):
            if control:
                ids.append(self._control_ids[part])
                continue
            if i > 0 and flags[parts[i - 1][0]].rstrip:
                part = part.lstrip()
            if i + 1 < len(parts) and flags[parts[i + 1][0]].lstrip:
                part = part.rstrip()
            ids += self._part_ids(part, i > 0 or continuing)
        return ids

    @cached_property
    def _added(self) -> dict[str, Any]:
        return {t.content: t for t in self.backend.get_added_tokens_decoder().values()}

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        return {name: i for i, name in self._special.items()}

    @cached_property
    def _part_ids(self) -> Callable[[str, bool], list[int]]:
        """Ids of text between control tokens. The last ones are kept: a conversation is rendered once for each of its
        turns, and its neighbours share a system message with it."""

        def encoded(part: str, continuing: bool) -> list[int]:
            backend = self._continuing if continuing else self.backend
            with self._lock, _faults_told():
                backend.encode_special_tokens = True
                # As a batch of one: other threads go on meanwhile.
                [found] = backend.encode_batch([part], add_special_tokens=False)
            ids: list[int] = found.ids
            return ids

        kept = lru_cache(maxsize=1024)(encoded)
        return lambda part, continuing: (kept if len(part) <= LONGEST_KEPT else encoded)(part, continuing)

    def _name(self, token_id: int | None) -> str:
        return "" if token_id is None else self.token(token_id)

    def digest(self) -> str:
        """SHA-256 of the definition: two tokenizers with one digest cut every text alike."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing folder; and the SentencePiece
        file that it lay beside, whose scores llama.cpp's converter needs, where all of that is still true."""
        self.backend.encode_special_tokens = False
        write_file(folder / "tokenizer.json", [self.backend.to_str(pretty=True).encode()])
        names = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id, "pad_token": self.pad_token_id}
        config: dict[str, Any] = {key: self._name(i) for key, i in names.items() if i is not None}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config["model_input_names"] = ["input_ids", "attention_mask"]  # transformers 4 would make token types, too
        pieces = spm.texts_of(self.model_file) if self.model_file is not None else []
        if self.model_file is not None and pieces == [self.token(i) for i in range(len(pieces))]:
            write_file(folder / "tokenizer.model", [self.model_file])
            flags = ("content", "special", "normalized", "lstrip", "rstrip", "single_word")  # one left out is another
            behind = sorted((i, t) for i, t in self.backend.get_added_tokens_decoder().items() if i >= len(pieces))
            told = {str(i): {flag: getattr(t, flag) for flag in flags} for i, t in behind}
            config |= {"added_tokens_decoder": told} if told else {}
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@contextmanager
def _faults_told() -> Iterator[None]:
    """Faults of the libraries below as ours."""
    try:
        yield
    except (UnicodeEncodeError, TypeError) as error:
        raise InputError(f"the text is not valid Unicode (half of a surrogate pair?): {error}") from None
    except BaseException as error:  # the Rust library raises plain Exception, and a panic of it is not even one
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise FormatError(
            f"the tokenizer gave up on this text, its file is broken (a regular expression?): {error}"
        ) from None


def _as(rows: list[list[int]], return_tensors: str | None) -> Any:
    if return_tensors is None:
        return rows
    if return_tensors != "pt":
        raise InputError(f'return_tensors is {return_tensors!r}; camelid makes "pt" tensors')
    import torch

    return torch.tensor(rows, dtype=torch.int64)
