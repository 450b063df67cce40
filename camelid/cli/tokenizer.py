"""Train a tokenizer of either LLaMA kind, look into one, encode text."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, dest="action", metavar="{train,inspect,encode}")
    train = actions.add_parser("train", help="train on a corpus")
    train.add_argument("corpus")
    train.add_argument("--out", required=True)
    train.add_argument("--vocab-size", type=int, default=32000)
    train.add_argument("--kind", choices=("sentencepiece", "byte-level"), default="byte-level")
    settings.example(train, "camelid tokenizer train out/corpus --out out/tokenizer --vocab-size 8192")
    inspect = actions.add_parser("inspect", help="size, special tokens, most frequent tokens")
    inspect.add_argument("tokenizer")
    encode = actions.add_parser("encode", help="encode the text on stdin")
    encode.add_argument("tokenizer")
    settings.example(encode, "echo 你好 | camelid tokenizer encode out/tokenizer")


def run(options: argparse.Namespace) -> dict[str, Any]:
    actions = {"train": _train, "inspect": _inspect, "encode": _encode}
    return actions[options.action](options)


def _train(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from camelid.corpus import documents
    from camelid.tokenizer.train import train

    corpus = Path(options.corpus)
    result = train(lambda: documents(corpus), options.out, options.vocab_size, options.kind, corpus=corpus)
    print(f"{result['vocab_size']:,} tokens ({result['kind']}) -> {options.out}", file=sys.stderr)
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
