"""A model into int8 or int4, with what it costs: perplexity, KL divergence, agreement. transformers and vLLM open the
folder (compressed-tensors); camelid's engine runs it without unpacking.

With --calibration, by GPTQ or AWQ; without, to nearest. A GGUF file of quantised weights is made by `camelid convert
--to gguf`.
"""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="full-precision weights")
    parser.add_argument("--format", choices=("int8", "int4"), required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--group", default="32", help="weights that share a scale: 32, 64, 128, … or row")
    parser.add_argument("--asymmetric", action="store_true", help="a zero of its own for every group")
    parser.add_argument("--calibration", metavar="DATA", help="a text, corpus or tokens folder: round by --method")
    parser.add_argument(
        "--method", choices=("gptq", "awq", "awq+gptq"),
        help="what --calibration is used for: gptq (other columns make up for an error; the default), awq (columns are "
        "scaled by their inputs), or both",
    )  # fmt: skip
    parser.add_argument("--data", help="what the cost is measured on: a text, corpus or tokens folder")
    parser.add_argument("--tokens", type=int, default=65536, help="whole windows of each, until so many are read")
    parser.add_argument("--by-layer", action="store_true", help="also the cost of each layer alone")
    parser.add_argument("--kv-cache", choices=("int8",), help="measure with keys and values kept so too")
    settings.example(
        parser, "camelid quantize runs/small --format int4 --calibration train.txt --data valid.txt --out small-int4"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.errors import InputError
    from camelid.quantize.job import Wish, quantize

    if options.group != "row" and not options.group.isdigit():
        raise InputError(f"--group {options.group}: a number of weights, or row")
    wish = Wish(
        options.format, None if options.group == "row" else int(options.group), not options.asymmetric,
        options.calibration, options.method, options.data, options.tokens, options.by_layer,
        options.kv_cache is not None,
    )  # fmt: skip
    result = quantize(options.model, options.out, wish, quiet=options.json)
    if not options.json:
        _show(result)
    return result


def _show(result: dict[str, Any]) -> None:
    before, after = result["before"], result["after"]
    print(f"{result['out']}: {result['scheme']}, {result['method']}")
    print(f"size        {before['bytes'] / 2**20:,.1f} -> {after['bytes'] / 2**20:,.1f} MiB")
    if "kl" not in result:
        print("What it cost was not measured: give --data, a text.")
        return
    print(f"perplexity  {before['token_perplexity']:.4f} -> {after['token_perplexity']:.4f}")
    print(f"KL          {result['kl']:.5f} nats on average, 99.9 % of tokens below {result['kl_p999']:.4f}")
    print(f"likeliest   the same token {100 * result['top1_agreement']:.2f} % of the time")
    print(result["protocol"])
