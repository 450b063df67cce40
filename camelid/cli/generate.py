"""Complete a prompt; the text streams to stdout, and what ended it goes to stderr."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings

# What says how tokens are drawn, of which a beam search draws none.
DRAWING = (
    "best_of", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "lookup", "draft", "seed", "stop", "json_schema", "regex",
)  # fmt: skip


def sampling_arguments(parser: argparse.ArgumentParser, temperature: float, min_p: float = 0.0) -> None:
    """The options that `generate` and `chat` share."""
    parser.add_argument("--max-new-tokens", type=int, help="tokens to write; 256 if no limit is given")
    parser.add_argument("--max-length", type=int, help="prompt and new tokens together")
    parser.add_argument("--temperature", type=float, default=temperature, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many of the likeliest tokens; 0 from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that sum up to this")
    parser.add_argument("--min-p", type=float, default=min_p, help="drop tokens rarer than this share of the likeliest")
    parser.add_argument("--typical-p", type=float, default=1.0, help="keep the tokens nearest to the expected surprise")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: rather not what was there before"
    )
    parser.add_argument("--presence-penalty", type=float, default=0.0, help="taken from tokens that were written")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, help="the same, for each time")
    parser.add_argument(
        "--lookup", type=int, default=0, metavar="N", help="guess N tokens a step; the text is the same"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="end at this string; may be given again")
    engine_arguments(parser)


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model is opened and run: what `open_engine` reads."""
    parser.add_argument("--threads", type=int)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=devices, default="auto", help="auto: a GPU that holds it, else the CPU")
    parser.add_argument("--dtype", help="of the weights; by default the file's own, and whole numbers of a GGUF file")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="round the weights while opening the model")
    parser.add_argument("--kv-cache", choices=("int8",), help="keep keys and values so: half of bfloat16's memory")
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="a smaller model of the same vocabulary that guesses what comes next; for a few texts at a time",
    )
    parser.add_argument("--draft-quantization", choices=("int8", "int4"), help="round the draft's weights")


def sampling(options: argparse.Namespace, form: Any = None) -> Any:
    """SamplingParams from the options, and what form the text must have."""
    from camelid.generate.sampling import SamplingParams

    return SamplingParams(
        max_new_tokens=options.max_new_tokens,
        max_length=options.max_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        typical_p=options.typical_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        lookup=options.lookup,
        seed=options.seed,
        stop=options.stop,
        form=form,
    )


def open_engine(options: argparse.Namespace, **more: Any) -> Any:
    """The Engine that the options ask for; `more` goes to `Engine.from_pretrained` too."""
    from camelid.formats.hf import dtype_named
    from camelid.generate.engine import Engine

    dtype = dtype_named(options.dtype) if options.dtype else None
    return Engine.from_pretrained(
        options.model, options.quantization, threads=options.threads, dtype=dtype, kv_cache=options.kv_cache,
        draft=options.draft, draft_quantization=options.draft_quantization, device=options.device, **more,
    )  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("prompt", help="the text to complete; - reads stdin")
    sampling_arguments(parser, temperature=0.0)
    parser.add_argument("--num-beams", type=int, metavar="N", help="search N texts at a time for the likeliest one")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of --num-beams: above 0 favours long texts")
    parser.add_argument(
        "--best-of", type=int, metavar="N", help="draw N texts, show the one of the best log-probability a token"
    )
    parser.add_argument("--json-schema", metavar="FILE", help="the text must be JSON of this schema")
    parser.add_argument("--regex", help="the text must match all of this regular expression")
    settings.example(parser, 'camelid generate runs/small "The meaning of life is" --max-new-tokens 40')


def _form(options: argparse.Namespace) -> Any:
    from camelid.errors import InputError
    from camelid.generate.constrain import Form

    if options.json_schema and options.regex:
        raise InputError("--json-schema and --regex: a text has one form")
    if options.json_schema:
        return Form("json_schema", settings.text_of(options.json_schema))
    return Form("regex", options.regex) if options.regex else None


def run(options: argparse.Namespace) -> dict[str, Any]:
    params = sampling(options, _form(options))
    beams = _beams(options)
    engine = open_engine(options)
    prompt = settings.text_of("-") if options.prompt == "-" else options.prompt
    if beams is not None or options.best_of is not None:
        found = engine.beam_search(prompt, beams) if beams else engine.several(prompt, params, 1, options.best_of)
        return _told(found[0], options.json, shown=False)
    stream = engine.stream(prompt, params)
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            result = end.value
            break
        if not options.json:
            print(piece, end="", flush=True)
    return _told(result, options.json, shown=True)


def _beams(options: argparse.Namespace) -> Any:
    from camelid.errors import InputError
    from camelid.generate.beam import BeamParams

    if options.best_of is not None and options.temperature == 0:
        raise InputError("--best-of draws texts: give --temperature, at 0 all are the same")
    if options.num_beams is None:
        if options.length_penalty != 1:
            raise InputError("--length-penalty is a beam search's: give --num-beams too")
        return None
    usual = argparse.ArgumentParser()
    arguments(usual)
    given = next((name for name in DRAWING if getattr(options, name) != usual.get_default(name)), None)
    if given:
        given = "--" + given.replace("_", "-")
        raise InputError(f"--num-beams with {given}: a beam search takes the likeliest texts as they are")
    return BeamParams(
        options.num_beams, 1, options.max_new_tokens, options.max_length, length_penalty=options.length_penalty
    )


def _told(result: Any, quiet: bool, shown: bool) -> dict[str, Any]:
    if not quiet:
        print("" if shown else result.text)
        score = "" if result.score is None else f", score {result.score:.3f}"
        print(f"[{len(result.ids)} tokens, ended by {result.finish_reason}{score}]", file=sys.stderr)
    return {
        "text": result.text,
        "ids": result.ids,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.ids),
    } | ({} if result.score is None else {"score": result.score})
