"""Measure a model, or texts against references, and compare what was measured. Every number states its protocol."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.cli import settings
from camelid.errors import InputError

if TYPE_CHECKING:
    from camelid.evaluate.perplexity import Scored
    from camelid.model.llama import Llama
    from camelid.tokenizer.tokenizer import Tokenizer

ACTIONS = "{perplexity,bleu,rouge,choice,answers,harness,compare,card}"


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, dest="action", metavar=ACTIONS)

    def of_model(name: str, about: str, data: str, example: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=about)
        action.add_argument("model")
        action.add_argument("--data", required=True, help=data)
        action.add_argument("--dtype", default="float32", help="float32, bfloat16, or auto: what the processor has")
        action.add_argument("--out", help="a folder for the record and its page, for `compare` and `card`")
        settings.example(action, f"camelid evaluate {name} {example}")
        return action

    perplexity = of_model("perplexity", "how well a model predicts a text", "any text file, a corpus, a tokens folder",
                          "runs/small --data held-out.txt --out out/held-out")  # fmt: skip
    perplexity.add_argument("--window", type=int, help="tokens read together; 2048, or the model's context if shorter")
    perplexity.add_argument(
        "--stride", type=int, help="new tokens scored in each window; all of them (no overlap) if not given"
    )
    perplexity.add_argument(
        "--bos", choices=("document", "window", "none"), default="document", help="where BOS stands"
    )
    perplexity.add_argument("--batch", type=int, default=1, help="windows read together")
    choices = of_model("choice", "multiple choice by log-likelihood", "questions, .jsonl",
                       "runs/small --data arc.jsonl --task arc --shots 5")  # fmt: skip
    answers = of_model("answers", "what a model writes, by number, text, BLEU, ROUGE or tests", "questions, .jsonl",
                       "runs/sft --data gsm8k.jsonl --task gsm8k --shots 5 --limit 200")  # fmt: skip
    for action, default in ((choices, "arc"), (answers, "gsm8k")):
        action.add_argument("--task", default=default, help="one of camelid's by name, or a .toml template")
        action.add_argument("--shots", type=int, default=0, help="solved questions before each, from the file's end")
        action.add_argument("--limit", type=int, help="the first N questions only")
    answers.add_argument("--samples", type=int, default=1, help="texts drawn of each question, for pass@k")
    answers.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    answers.add_argument("--execute", action="store_true", help="run the programs that the model writes")
    for name, about in (("bleu", "translations"), ("rouge", "summaries")):
        action = actions.add_parser(name, help=f"score {about} against references")
        action.add_argument("--hypotheses", required=True, help="one text a line")
        action.add_argument("--references", required=True, nargs="+", help="one or more files, one text a line")
        action.add_argument("--bootstrap", type=int, default=1000, help="samples for the interval; 0 for none")
        action.add_argument("--out", help="a folder for the record and its page, for `compare` and `card`")
        if name == "bleu":
            action.add_argument("--tokenize", default="13a", help="sacrebleu's tokenizer: 13a, intl, zh, char, …")
        else:
            action.add_argument("--no-stemmer", action="store_true")
            action.add_argument("--tokenize", default="words", help="words (a-z, 0-9), zh (characters), zh-words")
        settings.example(action, f"camelid evaluate {name} --hypotheses out.txt --references ref.txt")
    harness = actions.add_parser("harness", help="any task of lm-eval on a model (extra: harness)")
    harness.add_argument("model")
    harness.add_argument("--tasks", required=True, help="names, with commas between")
    harness.add_argument("--include", help="a folder of more task files")
    harness.add_argument("--shots", type=int)
    harness.add_argument("--limit", type=int)
    harness.add_argument("--dtype", default="float32")
    settings.example(harness, "camelid evaluate harness runs/small --tasks arc_challenge --limit 100")
    compare = actions.add_parser("compare", help="two evaluations of the same data, with significance")
    compare.add_argument("first")
    compare.add_argument("second")
    settings.example(compare, "camelid evaluate compare out/base out/tuned")
    card = actions.add_parser("card", help="a model card, from records only")
    card.add_argument("model")
    card.add_argument("evaluations", nargs="*", help="folders that `evaluate … --out` made")
    card.add_argument("--out", help="the file; README.md in the model's folder is what hubs show")
    settings.example(card, "camelid evaluate card runs/small out/held-out --out README.md")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.action != "card" and getattr(options, "out", None):
        from camelid.artifact import check_free

        check_free(Path(options.out), "evaluation")  # before the work, not after it
        texts = [getattr(options, "hypotheses", None), *(getattr(options, "references", None) or [])]
        if "-" in texts:
            raise InputError("--out keeps which files were scored: name files instead of -")
    result = MEASURES[options.action](options)
    from camelid.evaluate.record import summary

    if not options.json:
        _print(options.action, summary(result))
    return {key: value for key, value in result.items() if key != "items"}


def _print(action: str, result: dict[str, Any]) -> None:
    if action == "card":
        print(result["card"] if result["out"] is None else f"wrote {result['out']}")
        return
    for name, value in result.items():
        if name == "figures":
            for figure, found in value.items():
                print(f"{figure:<19} {_shown(found)}")
        else:
            print(f"{name:<19} {_shown(value)}")


def _opened(options: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    """The model, in the dtype asked for, and its tokenizer; a warning when it may have learned from the data."""
    from camelid.evaluate.opened import open_for

    model, tokenizer, warning = open_for(options.model, options.dtype, getattr(options, "data", None))
    if warning:
        print(f"camelid: warning: {warning}", file=sys.stderr)
    return model, tokenizer


def _keep(
    options: argparse.Namespace, result: dict[str, Any], data: list[str], tokenizer: Tokenizer | None = None,
    scored: Sequence[Scored] = (),
) -> None:  # fmt: skip
    if options.out:
        from camelid.evaluate import record
        from camelid.formats.load import resolve

        measured = resolve(options.model) if tokenizer is not None else Path(options.hypotheses)
        record.write(Path(options.out), options.action, result, measured, [Path(d) for d in data], tokenizer, scored)


def _perplexity(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.evaluate.perplexity import measured
    from camelid.evaluate.texts import read_texts

    model, tokenizer = _opened(options)
    texts = read_texts(Path(options.data), tokenizer)
    result, scored = measured(
        model, tokenizer, texts, options.window, options.stride, options.bos, options.batch, options.json
    )
    _keep(options, result, [options.data], tokenizer, scored)
    return result


def _choice(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.evaluate.choice import choice, questions, read_task
    from camelid.evaluate.templates import split_shots, template_label

    asked = questions(Path(options.data), read_task(options.task))
    asked, shots = split_shots(asked, options.shots, options.limit)
    model, tokenizer = _opened(options)
    result = choice(model, tokenizer, asked, shots=shots, task=template_label(options.task), quiet=options.json)
    _keep(options, result, [options.data], tokenizer)
    return result


def _answers(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.evaluate.answers import answers, asked_of, check, read_answer_task
    from camelid.evaluate.templates import split_shots
    from camelid.formats.load import stop_ids
    from camelid.generate.engine import Engine

    task = read_answer_task(options.task)
    check(task, options.samples, options.temperature, options.execute)
    asked, shots = split_shots(asked_of(Path(options.data), task), options.shots, options.limit)
    model, tokenizer = _opened(options)
    result = answers(
        Engine(model, tokenizer, stop_ids(options.model)), task, asked, shots=shots, samples=options.samples,
        temperature=options.temperature, execute=options.execute, quiet=options.json,
    )  # fmt: skip
    _keep(options, result, [options.data], tokenizer)
    return result


def _bleu(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.evaluate.bleu import bleu

    hypotheses, references = _pairs(options)
    result = bleu(hypotheses, references, tokenize=options.tokenize, bootstrap=options.bootstrap)
    pairs = zip(hypotheses, zip(*references, strict=True), strict=True)
    result["items"] = [{"hypothesis": h, "references": list(r)} for h, r in pairs]
    _keep(options, result, options.references)
    return result


def _rouge(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.evaluate.rouge import rouge

    hypotheses, references = _pairs(options)
    result = rouge(
        hypotheses, references, stemmer=not options.no_stemmer, tokenize=options.tokenize, bootstrap=options.bootstrap,
        items=True,
    )  # fmt: skip
    _keep(options, result, options.references)
    return result


def _pairs(options: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    if options.bootstrap < 0:
        raise InputError(f"--bootstrap {options.bootstrap}: 0 for none, or how many samples")
    return _lines(options.hypotheses), [_lines(r) for r in options.references]


def _harness(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.evaluate.harness import harness
    from camelid.formats.load import stop_ids

    model, tokenizer = _opened(options)
    names = [name for name in options.tasks.split(",") if name]
    stops = stop_ids(options.model)
    return harness(model, tokenizer, names, options.include, options.shots, options.limit, options.json, stops)


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.evaluate.compare import compare

    return compare(Path(options.first), Path(options.second))


def _card(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.evaluate.card import card, write

    text = card(options.model, [Path(e) for e in options.evaluations])
    if options.out:
        write(Path(options.out), text)
    return {"card": text, "out": options.out}


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "perplexity": _perplexity, "bleu": _bleu, "rouge": _rouge, "choice": _choice, "answers": _answers,
    "harness": _harness, "compare": _compare, "card": _card,
}  # fmt: skip


def _lines(path: str) -> list[str]:
    # Not splitlines(): a segment may hold U+2028 and the like, or a carriage return.
    return [
        line.removesuffix("\r") for line in settings.text_of(path).removeprefix("\ufeff").removesuffix("\n").split("\n")
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_shown(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
