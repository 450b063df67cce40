"""Race camelid against its peers on this machine; peers are installed into environments of their own when needed."""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="{data,train,infer,evaluate,serve}")
    data = actions.add_parser("data", help="filters, MinHash, tokenizers, the pipeline")
    data.add_argument("--data", required=True, help="documents to race on: files or a folder that the corpus reads")
    data.add_argument("--rounds", type=_count, default=3)
    data.add_argument("--megabytes", type=float, default=20.0, help="at most this much text")
    data.add_argument("--pipeline", type=_sizes, default=[], metavar="MB,MB", help="build corpora of these sizes too")
    data.add_argument("--workers", type=_count, default=1, help="processes of the pipeline")
    data.add_argument("--only", choices=("corpus", "tokens"), help="half of it: filters and MinHash, or tokenizers")
    data.set_defaults(action="data")
    settings.example(data, "camelid bench data --data texts/ --pipeline 100,1000 --workers 2")

    train = actions.add_parser("train", help="a training step beside transformers and litgpt, or peft")
    train.add_argument("--config", choices=("S", "M", "L"), action="append",
                       help="15 M, 110 M or, for a GPU, 1.2 B weights; by default S and M")  # fmt: skip
    train.add_argument("--task", choices=("full", "lora"), default="full", help="all weights, or an adapter (peft)")
    train.add_argument("--rounds", type=_count, default=3)
    train.add_argument("--steps", type=_steps, default=4, help="of each run; the first one is not counted")
    train.add_argument("--threads", type=_numbers, default=[1, 2], metavar="N,N")
    train.add_argument("--ablate", action="store_true", help="also without each technique, one at a time")
    settings.example(train, "camelid bench train --config S --threads 1 --ablate")
    train.set_defaults(action="train")

    evaluate = actions.add_parser("evaluate", help="perplexity beside transformers, choices beside lm-eval")
    evaluate.add_argument("model")
    evaluate.add_argument("--data", help="a text, for perplexity")
    evaluate.add_argument("--questions", help="a .jsonl file, for multiple choice")
    evaluate.add_argument("--task", default="arc", help="the questions' template")
    evaluate.add_argument("--limit", type=_count, default=100, help="the first N questions")
    evaluate.add_argument("--tokens", type=_count, default=32768, help="the first N tokens of the text")
    evaluate.add_argument("--window", type=_count, default=2048)
    evaluate.add_argument("--rounds", type=_count, default=3)
    evaluate.add_argument("--threads", type=_numbers, default=[1, 2], metavar="N,N")
    evaluate.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    settings.example(evaluate, "camelid bench evaluate model/ --data valid.txt --questions arc.jsonl")
    evaluate.set_defaults(action="evaluate")

    infer = actions.add_parser("infer", help="prefill, decoding and batches beside transformers, llama.cpp and others")
    infer.add_argument("model", nargs="?", help="by default random weights of TinyLlama's shape")
    infer.add_argument("--kind", choices=("bf16", "int8", "int4"), action="append", help="by default all three")
    infer.add_argument("--rounds", type=_count, default=3)
    infer.add_argument("--threads", type=_numbers, default=[1, 2], metavar="N,N")
    infer.add_argument("--alone", action="store_true", help="without peers")
    infer.add_argument("--context", type=_count, default=512, help="tokens of the text that is read and gone on with")
    infer.add_argument("--kv-cache", choices=("int8",), help="also with keys and values kept so")
    settings.example(infer, "camelid bench infer model/ --kind int8 --threads 1")
    infer.set_defaults(action="infer")

    serve = actions.add_parser("serve", help="8 and 32 clients beside llama-cpp-python's and transformers' servers")
    serve.add_argument("model", help="one that chats")
    serve.add_argument("--threads", type=_count, default=2)
    serve.add_argument("--alone", action="store_true", help="without peers")
    settings.example(serve, "camelid bench serve model/")
    serve.set_defaults(action="serve")


def _numbers(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _steps(text: str) -> int:
    if (number := _count(text)) < 2:
        raise argparse.ArgumentTypeError("the first step is not counted: 2 at least")
    return number


def _sizes(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.action == "train":
        from camelid.bench import train

        result = train.run(
            options.config or ["S", "M"], options.rounds, options.threads, options.steps, options.ablate, options.json,
            options.task,
        )  # fmt: skip
    elif options.action == "infer":
        from camelid.bench import infer

        kinds = options.kind or list(infer.PEERS)
        result = infer.run(
            options.model, kinds, options.rounds, options.threads, not options.alone, options.json, options.context,
            options.kv_cache is not None,
        )  # fmt: skip
    elif options.action == "serve":
        from camelid.bench import serve

        result = serve.run(options.model, options.threads, not options.alone, options.json)
    elif options.action == "evaluate":
        from camelid.bench import evaluate

        result = evaluate.run(
            options.model, options.data, options.questions, options.task, options.limit, options.tokens,
            options.window, options.rounds, options.threads, options.dtype, options.json,
        )  # fmt: skip
    else:
        result = _data(options)
    if not options.json:
        _show(result)
    return result


def _data(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.bench import data

    return data.run(
        options.data,
        options.rounds,
        int(options.megabytes * 1e6),
        options.pipeline,
        options.workers,
        options.json,
        options.only,
    )


def _show(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        figure = f"{row['value']:8.2f} {row['unit']}" if "value" in row else f"missing: {row['error']}"
        memory = f", {row['peak_bytes'] / 2**20:.0f} MiB at most" if row.get("peak_bytes") else ""
        name = f"{row['task']:<16} {row['implementation']:<10} {row.get('version', ''):<18}"
        waits = [f"{key} {row[f'first_token_{key}']:.2f} s" for key in ("p50", "p99") if f"first_token_{key}" in row]
        first = f", first token {', '.join(waits)}" if waits else ""
        print(f"{name} {row['threads']} threads {figure}{memory}{first}")
    for name, ratio in result["ratios"].items():
        print(f"{name} = {ratio:.2f}")
    if same := result.get("same_ids"):
        others = [name for name, equal in same.items() if not equal]
        print("all encoders gave the same ids" if not others else f"other ids than camelid's: {', '.join(others)}")
    if unlike := result.get("differences", {}).get("unlike"):
        print(f"decided differently: {len(unlike)} of {result['differences']['documents']} documents")
        for number, ours, theirs in unlike[:20]:
            print(f"  document {number}: camelid {ours or 'kept'}, datatrove {theirs or 'kept'}")
    for name, limit in result.get("limits", {}).items():
        print(f"{name}: {limit}")
