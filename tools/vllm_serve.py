"""Hand a model to vLLM: `vllm_serve.py MODEL [--adapter NAME=DIR] [--vllm PATH] [-- further options of vllm serve]`.

vLLM lives in an environment of its own; `--vllm` says where its command is. MODEL is whatever camelid opens as a
Hugging Face folder: a run's newest checkpoint is found, other formats are refused with the command that makes a folder
of them.
The key is CAMELID_API_KEY's, as for `camelid serve`; vLLM listens on loopback unless a further --host says otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from camelid.errors import CamelidError, InputError
from camelid.formats.adapter import base_of, is_adapter, read_config
from camelid.formats.load import load_tokenizer, open_model, resolve


def command(model: str, adapters: dict[str, str], vllm: str, further: list[str]) -> list[str]:
    """The words that start vLLM on MODEL. Raises InputError for what it cannot open."""
    path = resolve(model)
    name = Path(model).resolve().name
    if path.is_dir() and is_adapter(path):
        adapters = {name: str(path), **adapters}
        path, name = resolve(base_of(path)), "base"
    checkpoint = open_model(path)
    if checkpoint.format != "hf":
        raise InputError(
            f"vLLM opens Hugging Face folders: camelid convert {path} --to hf --out FOLDER, and give it that"
        )
    load_tokenizer(path)
    words = [vllm, "serve", str(path.resolve()), "--served-model-name", name, "--host", "127.0.0.1"]
    if adapters:
        folders = {n: resolve(folder) for n, folder in adapters.items()}
        rank = max(read_config(folder)[0].r for folder in folders.values())
        steps = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM has kernels for
        most = next((step for step in steps if step >= rank), None)
        if most is None:
            raise InputError(f"vLLM serves adapters up to rank {steps[-1]}, one has {rank}: camelid merge puts it in")
        words += ["--enable-lora", "--max-lora-rank", str(most), "--lora-modules"]
        words += [f"{n}={folder.resolve()}" for n, folder in folders.items()]
    return words + further


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--vllm", default="vllm", help="its command, for instance ~/vllm/bin/vllm")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    options, further = parser.parse_args(own), sys.argv[len(own) + 2 :]
    try:
        if shutil.which(options.vllm) is None:
            raise InputError(
                f"no command {options.vllm}: pip install vllm in an environment of its own, and say --vllm"
            )
        adapters = dict(pair.split("=", 1) for pair in options.adapter if "=" in pair)
        if len(adapters) < len(options.adapter):
            raise InputError("--adapter needs NAME=DIR, each name once")
        words = command(options.model, adapters, options.vllm, further)
    except CamelidError as error:
        print(f"vllm_serve: {error}", file=sys.stderr)
        sys.exit(2)
    key = os.environ.get("CAMELID_API_KEY")
    os.execvpe(words[0], words, {**os.environ, **({"VLLM_API_KEY": key} if key else {})})  # no key among the words


if __name__ == "__main__":
    main()
