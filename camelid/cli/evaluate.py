"""Measure a model (perplexity, choice) or texts against references (bleu, rouge). Every number states its protocol."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from camelid.cli import settings
from camelid.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, dest="action", metavar="{perplexity,bleu,rouge,choice}")
    perplexity = actions.add_parser("perplexity", help="how well a model predicts a text")
    perplexity.add_argument("model")
    perplexity.add_argument("--data", required=True, help="a text or .jsonl file, or a corpus folder")
    perplexity.add_argument("--window", type=int)
    perplexity.add_argument("--stride", type=int)
    perplexity.add_argument("--dtype", default="float32")
    settings.example(perplexity, "camelid evaluate perplexity runs/small --data held-out.txt")
    choices = actions.add_parser("choice", help="multiple choice by log-likelihood")
    choices.add_argument("model")
    choices.add_argument("--data", required=True, help="questions, .jsonl")
    choices.add_argument("--task", default="arc", help="arc, commonsense_qa, or a .toml template")
    choices.add_argument("--shots", type=int, default=0, help="solved questions before each, from the file's end")
    choices.add_argument("--limit", type=int, help="the first N questions only")
    choices.add_argument("--dtype", default="float32")
    settings.example(choices, "camelid evaluate choice runs/small --data arc.jsonl --task arc --shots 5")
    for name, about in (("bleu", "translations"), ("rouge", "summaries")):
        action = actions.add_parser(name, help=f"score {about} against references")
        action.add_argument("--hypotheses", required=True, help="one text a line")
        action.add_argument("--references", required=True, nargs="+", help="one or more files, one text a line")
        action.add_argument("--bootstrap", type=int, default=1000, help="samples for the interval; 0 for none")
        if name == "bleu":
            action.add_argument("--tokenize", default="13a", help="sacrebleu's tokenizer: 13a, zh, char, …")
        else:
            action.add_argument("--no-stemmer", action="store_true")
            action.add_argument("--tokenize", default="words", help="words (a-z, 0-9), zh (characters), zh-words")
        settings.example(action, f"camelid evaluate {name} --hypotheses out.txt --references ref.txt")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.action == "perplexity":
        result = _perplexity(options)
    elif options.action == "choice":
        result = _choice(options)
    else:
        if options.bootstrap < 0:
            raise InputError(f"--bootstrap {options.bootstrap}: 0 for none, or how many samples")
        hypotheses, references = _lines(options.hypotheses), [_lines(r) for r in options.references]
        if options.action == "bleu":
            from camelid.evaluate import bleu

            result = bleu(hypotheses, references, tokenize=options.tokenize, bootstrap=options.bootstrap)
        else:
            from camelid.evaluate import rouge

            stemmer, draws = not options.no_stemmer, options.bootstrap
            result = rouge(hypotheses, references, stemmer=stemmer, tokenize=options.tokenize, bootstrap=draws)
    if not options.json:
        for name, value in ((k, v) for k, v in result.items() if k != "answers"):
            print(f"{name:<17} {_shown(value)}")
    return result


def _perplexity(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.corpus import documents
    from camelid.corpus.clean import plain_text
    from camelid.corpus.decontaminate import unchecked
    from camelid.corpus.read import find_files, read
    from camelid.evaluate import perplexity
    from camelid.formats.hf import dtype_named
    from camelid.formats.load import load, load_tokenizer, resolve
    from camelid.model.llama import Llama

    if (Path(options.data) / "camelid.json").exists():
        texts = list(documents(options.data))
    else:
        found = [d for path in find_files([options.data]) for d in read(path)]
        bad = next((d for d in found if d.fault), None)
        if bad is not None:
            raise InputError(f"--data: {bad.source} cannot be read ({bad.fault})")
        texts = [plain_text(d) for d in found if not d.skip]
        if warning := unchecked(resolve(options.model), find_files([options.data])):
            print(f"camelid: warning: {warning}", file=sys.stderr)
    model: Llama = load(options.model, dtype=dtype_named(options.dtype))
    tokenizer = load_tokenizer(options.model)
    return perplexity(model, tokenizer, texts, window=options.window, stride=options.stride, quiet=options.json)


def _choice(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.corpus.decontaminate import unchecked
    from camelid.evaluate.choice import choice, questions, read_task
    from camelid.formats.hf import dtype_named
    from camelid.formats.load import load, load_tokenizer, resolve
    from camelid.model.llama import Llama

    asked = questions(Path(options.data), read_task(options.task))
    if not 0 <= options.shots < len(asked):
        raise InputError(f"--shots {options.shots} of {len(asked)} questions leaves none to ask, or is below 0")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit}: at least 1")
    asked, shots = asked[: len(asked) - options.shots][: options.limit], asked[len(asked) - options.shots :]
    if warning := unchecked(resolve(options.model), [Path(options.data)]):
        print(f"camelid: warning: {warning}", file=sys.stderr)
    model: Llama = load(options.model, dtype=dtype_named(options.dtype))
    return choice(model, load_tokenizer(options.model), asked, shots=shots, quiet=options.json)


def _lines(path: str) -> list[str]:
    try:
        # Not splitlines(): a segment may hold U+2028 and the like.
        return Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from None


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_shown(v)}" for k, v in value.items() if v is not None)
    return f"{value:.4f}" if isinstance(value, float) else str(value)
