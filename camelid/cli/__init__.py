"""The command line: one file a verb. Only the verb that was named is imported, so `camelid --help` is instant."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from camelid import __version__
from camelid.errors import CamelidError, ChecksFailed, InputError
from camelid.kernels.crumbs import begin_without
from camelid.kernels.threads import share_cores

# In the order of a model's life.
VERBS = {
    "quickstart": "the whole life on real text already on this machine",
    "corpus": "files to clean documents",
    "tokenizer": "documents to a vocabulary; encode and inspect",
    "tokens": "documents to packed token shards",
    "plan": "what a recipe will need: memory, speed, hours, money",
    "pretrain": "train a new model from a recipe",
    "finetune": "teach a model: answers, adapters, preferences",
    "merge": "an adapter into its base's weights",
    "quantize": "a model into int8 or int4, with what it costs",
    "convert": "a model into another format",
    "evaluate": "perplexity, BLEU, ROUGE, choices, with their protocol",
    "generate": "complete a prompt",
    "chat": "talk to a model in the terminal",
    "serve": "an OpenAI-compatible server and a chat page",
    "verify": "what is silently wrong with a model, if anything",
    "lineage": "where a folder came from, back to the raw files",
    "reproduce": "make a folder again, and compare it bit for bit",
    "bench": "camelid beside its peers, on this machine",
    "doctor": "what is slow or missing on this machine, and the fix",
    "info": "this machine, versions, and what camelid will use",
    "completion": "for bash, zsh or fish; or the manual page",
}
TRAINING = ("quickstart", "plan", "pretrain", "finetune", "reproduce")  # their memory is one step's, over and over
HELP = (
    "usage: camelid VERB … [key=value …] [--json]\n\nThe whole life of a LLaMA model.\n\n"
    + "\n".join(f"  {verb:<11} {summary}" for verb, summary in VERBS.items())
    + "\n\n`camelid VERB -h` shows a verb's options and an example, or its actions, each with its own `-h`.\n"
    "`--version` prints the version.\n"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits 0 done, 1 failed, 2 bad input, 130 on Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be of any bytes
    share_cores(os.environ)
    if arguments is None and sys.argv[1:2] and sys.argv[1] in TRAINING:
        begin_without()
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments:
        from camelid import here

        print(HELP + here.told(), end="")
        return 0
    if arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"camelid {__version__}")
        return 0
    try:
        module, options = parse(arguments)
        from camelid.artifact import made_by

        with made_by(arguments):
            result = module.run(options)
        if options.json and result is not None:
            print(_as_json(result))
    except InputError as error:
        return _complain(str(error), 2)
    except ChecksFailed as error:
        if options.json:
            print(_as_json(error.result))
        return _complain(str(error), 1)
    except CamelidError as error:
        return _complain(str(error), 1)
    except UnicodeEncodeError as error:  # a library that takes names in UTF-8 only
        return _complain(f"{error.object!r} holds bytes that are not UTF-8: rename the file or folder", 2)
    except KeyboardInterrupt:
        return _complain("stopped", 130)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _complain(str(error), 1)
    return 0


def _as_json(result: Any) -> str:
    """One line of JSON, in letters that stdout can spell."""
    return json.dumps(result, ensure_ascii=(sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8")


def parse(arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """A command's module and options. Raises InputError for what is no command of ours."""
    verb, *rest = arguments
    if verb not in VERBS:
        raise InputError(_unknown(verb))
    module, parser = parser_of(verb)
    return module, _parse(parser, rest)


def parser_of(verb: str) -> tuple[Any, argparse.ArgumentParser]:
    """A verb's module and its parser."""
    module = import_module(f"camelid.cli.{verb}")
    parser = _Parser(f"camelid {verb}", description=module.__doc__)
    module.arguments(parser)
    for leaf in leaves(parser).values():
        leaf.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return module, parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """With the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help
        if told is None or not action.option_strings or not has_default(action) or "%(default)s" in told:
            return told
        return f"{told} (default: %(default)s)"


def has_default(action: argparse.Action) -> bool:
    """Whether an option that is not given has a value: 0 is one."""
    return action.default not in (None, [], argparse.SUPPRESS) and action.default is not False


class _Parser(argparse.ArgumentParser):
    """Bad usage is bad input: one line, exit 2. Options are written out: what a command was is kept in manifests."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} -h)")


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Options, with `key=value` settings taken wherever they stand among them."""
    options, extra = parser.parse_known_args(words)
    unknown = [w for w in extra if w.startswith("-") or "=" not in w or not hasattr(options, "settings")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    if extra:
        options.settings = [*options.settings, *extra]
    return options


def leaves(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers that run something: the verb itself under "", or each of its actions by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {"": parser}


def _unknown(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(verb, VERBS, n=1)
    return f"no verb {verb!r}" + (f"; did you mean {near[0]!r}?" if near else "; see camelid --help")


def _complain(message: str, code: int) -> int:
    print(f"camelid: {' '.join(message.split())}", file=sys.stderr)
    return code
