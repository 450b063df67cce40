"""Serve a model to OpenAI's clients, and a chat page to the browser, on this machine.

SIGTERM or Ctrl-C lets open answers end (30 s at most), SIGHUP reads the key file again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from camelid.cli import settings
from camelid.cli.generate import engine_arguments, open_engine


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument("--api-key-file", type=Path, help="a key a line; or one in the variable CAMELID_API_KEY")
    parser.add_argument("--no-api-key", action="store_true", help="let anybody ask who reaches a host beyond loopback")
    parser.add_argument("--name", help="what requests call the model; by default the folder's name")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="a further model, by adapter"
    )
    parser.add_argument(
        "--allowed-host", action="append", default=[], help="a name this server is called by; * for any"
    )
    parser.add_argument("--cors-origin", action="append", default=[], help="a web page's origin that may ask")
    parser.add_argument("--cache-tokens", type=int, help="tokens of all texts that the KV cache holds")
    engine_arguments(parser)
    parser.add_argument(
        "--control-tokens",
        action="store_true",
        help="let the text of /v1/completions spell them: for callers you trust",
    )
    parser.add_argument("--quiet", action="store_true", help="no line a request")
    settings.example(parser, "camelid serve runs/sft --port 8000 --quantization int8")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from importlib.util import find_spec

    from camelid.errors import InputError, MissingExtra

    missing = next((name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None), None)
    if missing:
        raise MissingExtra(missing, "serve", "camelid serve")
    from camelid.serve.app import Service, app_of
    from camelid.serve.auth import LOOPBACK, Keys
    from camelid.serve.run import listen, run

    keys = Keys(options.api_key_file)
    if keys and options.no_api_key:
        raise InputError("--no-api-key, but there are keys (--api-key-file or CAMELID_API_KEY): leave out one of them")
    if options.host not in LOOPBACK and not keys and not options.no_api_key:
        raise InputError(
            f"--host {options.host} is reached by others: give --api-key-file, or --no-api-key to let anybody ask"
        )
    adapters = dict(_pair(text) for text in options.adapter)
    name = options.name or Path(options.model).resolve().name
    if name in adapters:
        raise InputError(f"--adapter {name}: the model itself has that name (see --name)")
    bound = listen(options.host, options.port)
    address = bound.getsockname()
    engine = open_engine(options, adapters=adapters or None, cache_tokens=options.cache_tokens)
    service = Service(engine, name, keys, control_tokens=options.control_tokens)
    hosts = {*LOOPBACK, options.host, *options.allowed_host}
    if keys and options.host in ("0.0.0.0", "::"):  # called by any of the machine's names; a key is asked for anyway
        hosts.add("*")
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    print(f"camelid: {name} on http://{shown}:{address[1]} (page), /v1 (OpenAI's API); Ctrl-C stops", file=sys.stderr)
    if options.no_api_key and options.host not in LOOPBACK:
        print("camelid: warning: whoever reaches this address may ask, without a key", file=sys.stderr)
    run(app_of(service, hosts, options.cors_origin, options.quiet), service, bound)
    return {"host": address[0], "port": address[1], "model": name, "models": list(service.names)}


def _pair(text: str) -> tuple[str, str]:
    from camelid.errors import InputError

    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise InputError(f"--adapter {text}: give it as NAME=DIR")
    return name, folder
