"""Train a tokenizer of either LLaMA kind, look into one, encode text."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, dest="action", metavar="{train,inspect,encode,extend}")
    train = actions.add_parser("train", help="train on a corpus")
    train.add_argument("corpus")
    train.add_argument("--out", required=True)
    train.add_argument("--vocab-size", type=int, default=32000)
    train.add_argument("--kind", choices=("sentencepiece", "byte-level"), default="byte-level")
    train.add_argument("--reserved", type=int, help="control tokens kept free for later (byte-level: 10)")
    train.add_argument("--max-bytes", type=int, default=4_000_000_000, help="learn from an even sample of this much")
    train.add_argument("--threads", type=int, help="any number gives the same tokenizer")
    settings.example(train, "camelid tokenizer train out/corpus --out out/tokenizer --vocab-size 8192")
    inspect = actions.add_parser("inspect", help="compression by language, round trip, unused and longest tokens")
    inspect.add_argument("tokenizer")
    inspect.add_argument("--text", nargs="*", default=[], metavar="FILE", help="texts or corpora to measure on")
    inspect.add_argument("--out", metavar="FILE.html", help="write a page that colours the text by token")
    settings.example(inspect, "camelid tokenizer inspect out/tokenizer --text letters.txt --out tokens.html")
    encode = actions.add_parser("encode", help="encode the text on stdin")
    encode.add_argument("tokenizer")
    settings.example(encode, "echo 你好 | camelid tokenizer encode out/tokenizer")
    extend = actions.add_parser("extend", help="add tokens learned on new text; a model's embeddings grow with them")
    extend.add_argument("model", help="a tokenizer, or a MODEL with weights")
    extend.add_argument("corpus")
    extend.add_argument("--pieces", type=int, default=4000, help="tokens to add")
    extend.add_argument("--out", required=True)
    settings.example(extend, "camelid tokenizer extend model/ out/chinese --pieces 4000 --out model-zh")


def run(options: argparse.Namespace) -> dict[str, Any]:
    actions = {"train": _train, "inspect": _inspect, "encode": _encode, "extend": _extend}
    return actions[options.action](options)


def _train(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from camelid.artifact import read_manifest
    from camelid.corpus import documents
    from camelid.tokenizer.train import train

    corpus = Path(options.corpus)
    result = train(
        lambda: documents(corpus), options.out, options.vocab_size, options.kind, reserved=options.reserved,
        threads=options.threads, max_bytes=options.max_bytes, corpus=corpus,
        corpus_bytes=int(read_manifest(corpus).get("text_bytes", 0)), quiet=options.json,
    )  # fmt: skip
    sample = result["sample"]
    print(
        f"{result['vocab_size']:,} tokens ({result['kind']}), learned from {sample['documents_used']:,} of "
        f"{sample['documents']:,} documents, {sample['bytes'] / max(1, result['tokens_in_corpus']):.2f} bytes per token "
        f"on all of them -> {options.out}",
        file=sys.stderr,
    )
    return result


def _extend(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from camelid.corpus import documents
    from camelid.formats.extend import extend

    result = extend(options.model, Path(options.corpus), lambda: documents(options.corpus), options.pieces, options.out)
    if not options.json:
        before, after = result["bytes_per_token"]
        print(f"{result['added']:,} tokens added, {result['vocab_size']:,} now: {before:.3f} -> {after:.3f} bytes per token")
        print(f"-> {options.out}")
    return result


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.formats.load import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    result = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "special_tokens": {str(i): t for i, t in sorted(tokenizer.special_tokens.items())},
        "chat_template": tokenizer.chat_template is not None,
        "digest": tokenizer.digest(),
    }
    if not options.json:
        for name, value in result.items():
            print(f"{name:<16} {value}")
    return result


def _encode(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.formats.load import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    ids = tokenizer.encode(sys.stdin.read().removesuffix("\n"), parse_special=False)
    result = {"ids": ids, "tokens": [tokenizer.token(i) for i in ids]}
    if not options.json:
        print(" ".join(f"{i}:{t}" for i, t in zip(result["ids"], result["tokens"], strict=True)))
    return result
