"""Every reader of what others wrote, as a function of bytes: whatever the bytes are, what they hold is taken or refused
by an exception of ours. `guided` looks for bytes that break this; what it found is kept in found/ and played again."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from .seeds import MODEL, words

Reader = Callable[[bytes, Path], object]
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1]}}}]},
    {"role": "user", "content": "骆驼"},
]


def taken(reader: Reader, data: bytes, folder: Path) -> bool:
    """Whether a reader takes the bytes rather than refuses them. Any other exception is a finding."""
    from camelid.errors import CamelidError
    from camelid.finetune.records import BadRow
    from camelid.serve.faults import Fault

    try:
        reader(data, folder)
        return True
    except (CamelidError, Fault, BadRow) as error:
        said = str(error)
    assert said.strip(), "a refusal without a word"
    return False


def _file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def safetensors(data: bytes, folder: Path) -> None:
    from camelid.formats.safetensors_file import OpenFile

    for _, stored in OpenFile().tensors(_file(folder, "model.safetensors", data)):
        stored.dense()


def gguf(data: bytes, folder: Path) -> None:
    from camelid.formats.gguf import open_file
    from camelid.formats.gguf_file import PLAIN, parse
    from camelid.tokenizer.gguf_fields import from_gguf

    path = _file(folder, "model.gguf", data)
    parsed = parse(path)
    for name in parsed.tensors:
        parsed.tensor(name)
        if parsed.tensors[name].type not in PLAIN:
            parsed.integers(name)
    open_file(path).tensors()
    from_gguf(path, parsed.metadata).encode("The meaning of 骆驼")


def pickled(data: bytes, folder: Path) -> None:
    """The bytes are the pickle of a `.bin` file, whose one storage is sound."""
    from camelid.formats.pickle_reader import Archive

    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", data)
        made.writestr("archive/data/0", bytes(64))
    archive = Archive(path)
    for name in archive.tensors:
        archive.read(name)


def config(data: bytes, folder: Path) -> None:
    """config.json, generation_config.json, or an adapter's, by the first byte."""
    from camelid.formats.adapter import read_config
    from camelid.formats.load import open_model, stop_ids

    kind, rest = data[:1], data[1:]
    if kind == b"a":
        read_config(_file(folder, "adapter_config.json", rest).parent)
        return
    _file(folder, "model.safetensors", b"")
    _file(folder, "config.json", MODEL if kind == b"g" else rest)
    _file(folder, "generation_config.json", rest if kind == b"g" else b"{}")
    open_model(folder)
    stop_ids(folder)


def tokenizer(data: bytes, folder: Path) -> None:
    """tokenizer.json and, after a zero byte, tokenizer_config.json."""
    from camelid.tokenizer.load import from_folder

    vocabulary, _, settings = data.partition(b"\0")
    _file(folder, "tokenizer.json", vocabulary)
    _file(folder, "tokenizer_config.json", settings or b"{}")
    found = from_folder(folder)
    found.decode(found.encode("The meaning of 骆驼 <s> </s>"))
    if found.chat_template:
        found.apply_chat_template(TALK)


def vocabulary(data: bytes, folder: Path) -> None:
    """A tokenizer.model: SentencePiece's or Tiktoken's."""
    from camelid.tokenizer.load import from_model_file

    found = from_model_file(_file(folder, "tokenizer.model", data))
    found.decode(found.encode("The meaning of 骆驼"))


def template(data: bytes, folder: Path) -> None:
    from camelid.tokenizer.template import render

    render(data.decode("utf-8", "replace"), TALK, tools=TOOLS, add_generation_prompt=True, bos_token="<s>")


def recipe(data: bytes, folder: Path) -> None:
    from camelid.recipe import load

    load(_file(folder, "recipe.toml", data)).settings()


def task(data: bytes, folder: Path) -> None:
    """A task's template and, after a zero byte, its rows."""
    from camelid.evaluate.answers import asked_of, read_answer_task
    from camelid.evaluate.choice import questions, read_task

    form, _, rows = data.partition(b"\0")
    path, asked = _file(folder, "task.toml", form), _file(folder, "rows.jsonl", rows)
    if b"choices" in form:
        questions(asked, read_task(str(path)))
    else:
        asked_of(asked, read_answer_task(str(path)))


SUFFIXES = (".txt", ".html", ".jsonl", ".json", ".csv", ".tsv", ".xml", ".warc", ".gz", ".bz2", ".xz", ".zst", ".py")


def corpus(data: bytes, folder: Path) -> None:
    """A raw file, whose kind the first byte tells: read, with nothing lost, and cleaned."""
    from camelid.corpus import c4, pii
    from camelid.corpus.bytestream import compression
    from camelid.corpus.clean import plain_text
    from camelid.corpus.read import read
    from camelid.corpus.repair import polish
    from camelid.corpus.statistics import measure, reference

    kind, rest = data[:1] or b"\0", data[1:]
    path = _file(folder, f"raw{SUFFIXES[kind[0] % len(SUFFIXES)]}", rest)
    documents = list(read(path))
    wide = rest.startswith((b"\xff\xfe", b"\xfe\xff"))  # its size is told in UTF-8
    if not compression(path) and not wide:
        assert sum(document.size for document in documents) == len(rest)
    good = [d for d in documents if not d.fault and not d.skip]
    texts = [polish(plain_text(d, "resiliparse"), d.kind) for d in good]
    assert measure(texts) == [reference(text) for text in texts]
    assert c4.clean(texts) == [c4.reference(text) for text in texts]
    for text in texts:
        pii.mask(text, Counter())


def rows(data: bytes, folder: Path) -> None:
    """Training rows: JSON, or JSON lines, by the first byte."""
    from camelid.finetune.read import read_file

    name = "rows.json" if data[:1] == b"[" else "rows.jsonl"
    read_file(_file(folder, name, data), lambda record: record)


def request(data: bytes, folder: Path) -> None:
    """A body of the server, whose route the first byte tells, up to what is rendered."""
    from camelid.serve import requests, tools
    from camelid.serve.limits import Limits, parse

    kinds = (requests.ChatRequest, requests.CompletionRequest, requests.EmbeddingRequest, requests.ResponseRequest,
             requests.TokenizeRequest)  # fmt: skip
    kind = kinds[(data[:1] or b"\0")[0] % len(kinds)]
    read = requests.read(kind, parse(data[1:], Limits().depth))
    if isinstance(read, requests.ChatRequest):
        offered = tools.offered(read)
        for known in ("", "{{ tools }}"):
            json.dumps(tools.messages(read.messages, offered, known))
        if offered:
            tools.form(offered)


def answer(data: bytes, folder: Path) -> None:
    """What a model wrote, piece by piece: what was shown as text early on stays text."""
    from camelid.serve.requests import Tool
    from camelid.serve.tools import begun_call, certain_text, read_calls

    text = data.decode("utf-8", "replace")[:400]
    said, _ = read_calls(text, [Tool.model_validate(tool) for tool in TOOLS])
    shown = [certain_text(text[:end]) for end in range(len(text) + 1)]
    assert all(a <= b for a, b in pairwise(shown))
    assert shown[-1] <= len(said)
    for end in range(len(text) + 1):
        begun_call(text[:end], end == len(text))


def form(data: bytes, folder: Path) -> None:
    """What a text must be, whose kind the first byte tells; some of its texts are walked."""
    from camelid.generate.constrain import Form, Matcher

    kinds = ("json_schema", "regex", "choice", "grammar")
    kind = kinds[(data[:1] or b"\0")[0] % len(kinds)]
    wanted = Form(kind, data[1:].decode("utf-8", "replace"))  # type: ignore[arg-type]
    matcher = Matcher(wanted, words(), len(words()), (0,))
    for step in range(8):
        allowed = matcher.allowed().nonzero().flatten().tolist()
        if not allowed or matcher.take(allowed[step % len(allowed)]):
            return


def manifest(data: bytes, folder: Path) -> None:
    """A manifest as it is, or sealed as one of ours when it has no seal."""
    from camelid.artifact import SEAL, _sealed, damage, lineage

    text = data.decode("utf-8", "replace")
    _file(folder, "camelid.json", data if SEAL in text else _sealed(text).encode())
    damage(folder)
    lineage(folder)


TARGETS: dict[str, Reader] = {
    reader.__name__: reader
    for reader in (
        safetensors, gguf, pickled, config, tokenizer, vocabulary, template, recipe, task, corpus, rows, request,
        answer, form, manifest,
    )
}  # fmt: skip
