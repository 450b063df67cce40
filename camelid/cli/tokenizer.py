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
    train.add_argument("--vocab-size", type=int, default=32000, help="tokens, control tokens among them")
    train.add_argument(
        "--kind", choices=("sentencepiece", "byte-level"), default="byte-level", help="LLaMA 1 and 2's, or Llama 3's"
    )
    train.add_argument("--reserved", type=int, help="control tokens kept free for later (byte-level: 10)")
    train.add_argument("--max-bytes", type=int, default=4_000_000_000, help="learn from an even sample of this much")
    train.add_argument(
        "--character-coverage", type=float, metavar="SHARE",
        help="sentencepiece: of the text, whose characters get a piece each; the rest become bytes (LLaMA's 0.99995, "
        "the default)",
    )  # fmt: skip
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
        character_coverage=options.character_coverage,
        corpus_bytes=int(read_manifest(corpus).get("text_bytes", 0)), quiet=options.json,
    )  # fmt: skip
    sample, tokens = result["sample"], max(1, result["tokens_in_corpus"])
    print(
        f"{result['vocab_size']:,} tokens ({result['kind']}), learned from {sample['documents_used']:,} of "
        f"{sample['documents']:,} documents, {sample['bytes'] / tokens:.2f} bytes per token "
        f"on all of them -> {options.out}",
        file=sys.stderr,
    )
    return result


def _extend(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from camelid.artifact import read_manifest
    from camelid.corpus import documents
    from camelid.formats.extend import extend
    from camelid.report.progress import followed

    corpus = Path(options.corpus)
    size = int(read_manifest(corpus).get("text_bytes", 0))
    result = extend(
        options.model, corpus, lambda: followed(documents(corpus), "reading", size, options.json), options.pieces,
        options.out,
    )  # fmt: skip
    if not options.json:
        before, after = result["bytes_per_token"]
        print(f"{result['added']:,} tokens added, {result['vocab_size']:,} now")
        print(f"bytes per token on the corpus: {before:.3f} before, {after:.3f} now")
        print(f"-> {options.out}")
    return result


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from camelid.corpus.language import identify
    from camelid.formats.load import load_tokenizer
    from camelid.tokenizer import inspect

    tokenizer = load_tokenizer(options.tokenizer)
    if options.out:
        inspect.check_page(Path(options.out))  # before the work, not after it
    texts, named = _texts(options.text), {text: name for name, text in inspect.SAMPLES.items()}
    found = inspect.inspect(tokenizer, texts, (lambda text: named[text]) if not options.text else identify)
    facts = inspect.summary(tokenizer, found, inspect.read_counts(Path(options.tokenizer)))
    if options.out:
        inspect.write_page(Path(options.out), tokenizer, facts, texts[:20])
    if not options.json:
        _show(facts)
        print(f"-> {options.out}" if options.out else "(--out FILE.html shows a text token by token)")
    return facts


def _texts(paths: list[str]) -> list[str]:
    from camelid.corpus.clean import texts_of
    from camelid.errors import InputError
    from camelid.tokenizer.inspect import SAMPLES

    texts = list(texts_of(paths)) if paths else list(SAMPLES.values())
    if not texts:
        raise InputError(f"{', '.join(paths)}: there is no text to measure on")
    return texts


def _show(facts: dict[str, Any]) -> None:
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "chat_template", "digest"):
        print(f"{name:<16} {facts[name]}")
    print(
        f"{'special_tokens':<16} {len(facts['special_tokens'])}: {' '.join(list(facts['special_tokens'].values())[:8])}"
    )
    print(f"{'language':<16} {'texts':>7} {'bytes/token':>12} {'tokens/word':>12} {'tokens/char':>12} {'whole':>7}")
    for name, fit in facts["languages"].items():
        print(
            f"{name:<16} {fit['documents']:>7,} {fit['bytes_per_token']:>12.3f} {fit['tokens_per_word']:>12.3f} "
            f"{fit['tokens_per_character']:>12.3f} {fit['coverage']:>7.1%}"
        )
    trip, unused = facts["round_trip"], facts["unused"]
    print(f"{'round trip':<16} {trip['returned']:,} of {trip['documents']:,} texts come back letter for letter")
    print(f"{'unused':<16} {unused['count']:,} tokens never occur in {unused['counted_in']}")
    print(f"{'longest':<16} {' '.join(t if len(t) < 24 else t[:20] + '…' for t in facts['longest'][:8])}")


def _encode(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.formats.load import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    ids = tokenizer.encode(settings.text_of("-").removesuffix("\n"), parse_special=False)
    result = {"ids": ids, "tokens": [tokenizer.token(i) for i in ids]}
    if not options.json:
        print(" ".join(f"{i}:{t}" for i, t in zip(result["ids"], result["tokens"], strict=True)))
    return result
