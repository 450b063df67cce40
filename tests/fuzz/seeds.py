"""Sound bytes for every reader of `targets`: what a search begins from."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from base64 import b64encode
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
TEXT = ("The meaning of life is to learn.", "骆驼在沙漠里走。", "def area(w, h):\n    return w * h") * 5
MODEL = json.dumps({
    "model_type": "llama", "vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False},
}).encode()  # fmt: skip
ADAPTER = json.dumps({
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "base",
    "use_rslora": True, "bias": "none",
}).encode()  # fmt: skip
WIKI = (
    b"<mediawiki>\n<page>\n<title>A</title>\n<ns>0</ns>\n<revision>\n<text>'''A''' is a [[letter|sign]] {{x}}.</text>\n"
    b"</revision>\n</page>\n</mediawiki>\n"
)
WARC = (
    b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/\r\nContent-Length: 82\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<p>The meaning of life.</p>\r\n\r\n"
)
CHOICE = b'{"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}'
PAGE = "<html><head><meta charset='utf-8'></head><body><p>The meaning of life, 骆驼.</p></body></html>".encode()


@lru_cache(maxsize=1)
def words() -> Any:
    """A small byte-level tokenizer."""
    from camelid.tokenizer.load import from_folder
    from camelid.tokenizer.train import train

    with TemporaryDirectory() as folder:
        train(lambda: TEXT, Path(folder) / "t", 300, "byte-level")
        return from_folder(Path(folder) / "t")


def seeds() -> dict[str, list[bytes]]:
    """Of each reader, bytes that it takes."""
    return _models() | {
        "pickled": _pickles(),
        "config": [b"c" + MODEL, b'g{"eos_token_id": [1, 2], "temperature": 0.5}', b"a" + ADAPTER],
        "template": _templates(),
        "recipe": [path.read_bytes() for path in (ROOT / "recipes").glob("*.toml")],
        "task": [
            (ROOT / "camelid" / "evaluate" / "tasks" / f"{name}.toml").read_bytes() + b"\0" + row
            for name, row in (("arc", CHOICE), ("gsm8k", b'{"question": "2 + 2?", "answer": "#### 4"}'))
        ],
        "corpus": _raw(),
        "rows": [
            b'{"instruction": "Add.", "input": "2 2", "output": "4"}\n{"text": "A text."}\n',
            b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n',
            b'[{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, {"prompt": "a", "completion": "b", "label": 1}]',
            b'{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}\n',
        ],
        "request": [
            b'\0{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "tools": [{"type":'
            b' "function", "function": {"name": "f", "parameters": {"type": "object", "$defs": {}}}}]}',
            b'\x01{"model": "m", "prompt": ["a", "b"], "logprobs": 2, "stop": ["x"], "temperature": 0.5}',
            b'\x02{"model": "m", "input": [[1, 2], [3]], "encoding_format": "base64"}',
            b'\x03{"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}',
            b'\x04{"text": "a"}',
        ],
        "answer": [
            b'Let me see. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
            b'[{"name": "f", "parameters": {}}]', b'{"name": "f", "arguments": {}}; {"name": "f", "arguments": {}}',
        ],
        "form": [
            b'\0{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 1]}}}',
            b"\x01[a-z]+(@|\\.)\\d{2,3}", b'\x02["yes", "no"]', b"\x03start: \"a\" | b\nb: /[0-9]+/\n",
        ],
        "manifest": _manifests(),
    }  # fmt: skip


def _models() -> dict[str, list[bytes]]:
    """A model in each form that is one file, and its tokenizers."""
    import torch

    from camelid.formats import save
    from camelid.formats.convert import convert
    from camelid.model.config import LlamaConfig
    from camelid.model.llama import Llama
    from camelid.tokenizer.train import train

    with TemporaryDirectory() as name:
        folder = Path(name)
        train(lambda: TEXT, folder / "s", 300, "sentencepiece")
        shape = LlamaConfig(
            vocab_size=len(words()), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        save(Llama(shape), folder / "m")
        words().save(folder / "m")
        found = {"safetensors": [(folder / "m" / "model.safetensors").read_bytes()]}
        convert(folder / "m", folder / "m.gguf", "gguf", kind="F16")
        found["gguf"] = [(folder / "m.gguf").read_bytes()]
        found["tokenizer"] = [
            (folder / at / "tokenizer.json").read_bytes() + b"\0" + (folder / at / "tokenizer_config.json").read_bytes()
            for at in ("m", "s")
        ]
        found["vocabulary"] = [(folder / "s" / "tokenizer.model").read_bytes()]
    found["vocabulary"].append(b"".join(b"%s %d\n" % (b64encode(bytes([n])), n) for n in range(256)))
    return found


def _pickles() -> list[bytes]:
    """What torch's own writer makes of a few tensors."""
    import torch

    made = io.BytesIO()
    storage = torch.arange(16, dtype=torch.float32)
    torch.save({"a": storage.view(4, 4), "b": storage[2:5], "c": torch.nn.Parameter(storage)}, made)
    with zipfile.ZipFile(made) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        return [archive.read(name), pickle.dumps({}, protocol=2)]


def _templates() -> list[bytes]:
    from camelid.tokenizer.template import NAMED

    more = (
        "{%- set ns = namespace(x=0) %}{% for m in messages if m.role != 'system' %}{{ m.content | trim | tojson }}"
        "{% endfor %}"
    )
    return [text.encode() for text in (*NAMED.values(), more)]


def _raw() -> list[bytes]:
    """A file of each kind (`targets.SUFFIXES`), after the byte that tells it."""
    import bz2
    import lzma

    text = "Call +1 (555) 010-9999 or write to a@b.example.\n\n" + "\n".join(TEXT)
    kinds = [
        text.encode(), PAGE, b'{"text": "The meaning of life."}\n{"title": "A", "paragraphs": ["a", "b"]}\n',
        b'[{"text": "The meaning"}, {"content": "of life"}]', b'id,text\n1,"The meaning\nof life"\n',
        b"id\ttext\n1\tThe meaning\n", WIKI, WARC, gzip.compress(text.encode(), mtime=0), bz2.compress(text.encode()),
        lzma.compress(text.encode()),
    ]  # fmt: skip
    return [bytes([n]) + kind for n, kind in enumerate(kinds)] + [b"\0" + text.encode("utf-16")]


def _manifests() -> list[bytes]:
    from camelid.artifact import SEAL, write_manifest

    with TemporaryDirectory() as folder:
        write_manifest(Path(folder), "model", [Path(folder)], {"a": 1}, {"config.json": "0" * 64})
        sealed = (Path(folder) / "camelid.json").read_text(encoding="utf-8")
        return [sealed.encode(), (sealed.rpartition(SEAL)[0] + "\n}").encode()]
