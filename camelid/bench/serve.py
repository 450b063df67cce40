"""Servers beside each other: the same model, the same conversations, 8 and 32 clients at once. Tokens a second over all
clients, and how long until the first one; tokens are counted by the model's own tokenizer, whoever wrote them."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from camelid.bench.infer import prepare
from camelid.bench.race import Contestant, interpreter, ratios
from camelid.errors import CamelidError
from camelid.kernels.threads import by_default
from camelid.report.progress import progress
from camelid.tokenizer.tokenizer import Tokenizer

CLIENTS, REQUESTS, TOKENS = (8, 32), 2, 64
LLAMA = ("llama-cpp-python[server]==0.3.36", "numpy")
TRANSFORMERS = ("transformers[serving]==5.23.0", "torch==2.13.0", "numpy")
WORDS = [
    "camel", "desert", "water", "carries", "trader", "river", "winter", "story", "engine", "letter", "garden", "music",
    "number", "window", "teacher", "market", "stone", "bridge", "paper", "question", "morning", "island", "kitchen",
]  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A server: what it is called, what it needs, how it is started, and by which name it knows the model."""

    name: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    model: str = "model"
    variables: tuple[tuple[str, str], ...] = ()


def servers(folder: Path, threads: int) -> list[Server]:
    """PORT in a command is filled in; the first word is run with the environment's Python, or is its script.

    vLLM is not installed on demand, for its build for CPUs is not the one that pip finds under its name: CAMELID_VLLM
    says where its command is."""
    own: tuple[str, ...] = (
        "-m",
        "camelid",
        "serve",
        str(folder / "model"),
        "--name",
        "model",
        "--port",
        "PORT",
        "--quiet",
        "--device",
        "cpu",
        "--threads",
    )
    llama: tuple[str, ...] = (
        "-m",
        "llama_cpp.server",
        "--port",
        "PORT",
        "--n_ctx",
        "2048",
        "--interrupt_requests",
        "False",
    )
    llama = (*llama, "--n_threads", str(threads), "--n_threads_batch", str(threads), "--model")
    theirs = ("transformers", "serve", "--port", "PORT", "--dtype", "bfloat16")
    return [
        Server("camelid int8", (), (*own, str(threads), "--quantization", "int8")),
        Server("camelid bf16", (), (*own, str(threads))),
        Server("llama-cpp-python Q8_0", LLAMA, (*llama, str(folder / "Q8_0.gguf"))),
        Server("llama-cpp-python F16", LLAMA, (*llama, str(folder / "F16.gguf"))),
        Server("transformers serve bf16", TRANSFORMERS, theirs, str(folder / "model")),
        Server(
            "transformers serve bf16, batching", TRANSFORMERS, (*theirs, "--continuous-batching"), str(folder / "model")
        ),
        _vllm(folder, threads),
    ]


def _vllm(folder: Path, threads: int) -> Server:
    """As it is by default, compiled, on the first cores; 2 GiB of cache hold all the conversations."""
    found = os.environ.get("CAMELID_VLLM") or shutil.which("vllm") or "vllm"
    words = (found, "serve", str(folder / "model"), "--served-model-name", "model", "--port", "PORT")
    variables = (("VLLM_CPU_KVCACHE_SPACE", "2"), ("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}"))
    return Server("vllm bf16", (), (*words, "--dtype", "bfloat16", "--max-model-len", "2048"), "model", variables)


def run(model: str, threads: int = 2, peers: bool = True, quiet: bool = False) -> dict[str, Any]:
    """Race on MODEL. Returns rows, one a server and number of clients, and ratios."""
    from camelid.formats import gguf_write
    from camelid.formats.load import load, load_tokenizer
    from camelid.model.llama import Llama
    from camelid.model.quantized import make_dense

    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, model)
        words = load_tokenizer(model)
        full: Llama = load(model)
        make_dense(full)
        gguf_write.write(full.config, dict(full.named_parameters()), words, folder / "Q8_0.gguf", "Q8_0")
        racing = [s for s in servers(folder, threads) if peers or s.name.startswith("camelid")]
        with progress("bench", len(racing), quiet) as advance:
            for number, server in enumerate(racing):
                rows += measured(server, words, threads)
                advance(number + 1, server.name)
    own = (server.name for server in racing if server.name.startswith("camelid"))
    theirs = [row for row in rows if not row["implementation"].startswith("camelid")]
    mine = {name: [row for row in rows if row["implementation"] == name] for name in own}
    found = {k: v for name, one in mine.items() for k, v in ratios([*one, *theirs], name).items()}
    return {"rows": rows, "ratios": found, "limits": {}}


def measured(server: Server, words: Tokenizer, threads: int) -> list[dict[str, Any]]:
    """Start a server, send it everything, stop it."""
    version = " ".join(server.packages[:1])
    row = {"implementation": server.name, "threads": threads, "unit": "tokens/s", "version": version}
    python = interpreter(Contestant(server.name, "", "", server.packages))
    if python is None:
        return [row | {"task": "serve", "error": f"pip could not install {' '.join(server.packages)}"}]
    port = free_port()
    words_of = [str(port) if word == "PORT" else word for word in server.command]
    first = [str(python)] if words_of[0] == "-m" else [str(python.parent / words_of.pop(0))]
    if not Path(first[0]).exists():
        hint = ": name it in CAMELID_VLLM" if server.name.startswith("vllm") else ""
        return [row | {"task": "serve", "error": f"no command {first[0]}{hint}"}]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) | dict(server.variables)
    environment = by_default(os.environ) | limits | {"HF_HUB_OFFLINE": "1", "CAMELID_API_KEY": ""}
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen([*first, *words_of], stdout=nowhere, stderr=nowhere, env=environment)
    try:
        wait_for(process, port)
        asyncio.run(load_with(server, port, 1, 1))  # it may open the model only now
        found = []
        for clients in CLIENTS:
            seconds, answers = asyncio.run(load_with(server, port, clients, REQUESTS))
            tokens = sum(len(words.encode(text, add_special_tokens=False)) for text, _ in answers)
            waits = sorted(wait for _, wait in answers)
            found.append(row | {
                "task": f"serve {clients} clients", "value": tokens / seconds, "rounds": [tokens / seconds],
                "tokens": tokens, "first_token_p50": median(waits),
                "first_token_p99": waits[math.ceil(0.99 * len(waits)) - 1],
            })  # fmt: skip
        return found
    except (CamelidError, OSError, ValueError, asyncio.IncompleteReadError) as error:
        return [row | {"task": "serve", "error": f"{type(error).__name__}: {error}"}]
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(process: subprocess.Popen[bytes], port: int, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CamelidError(f"the server ended with {process.returncode} before it was ready")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise CamelidError(f"the server was not ready after {seconds:.0f} s")


async def load_with(server: Server, port: int, clients: int, requests: int) -> tuple[float, list[tuple[str, float]]]:
    """Seconds from the first request to the last answer, and of each answer its text and seconds to its first."""
    rng = random.Random(clients)
    prompts = [[" ".join(rng.choices(WORDS, k=80)) for _ in range(requests)] for _ in range(clients)]

    async def client(mine: Sequence[str]) -> list[tuple[str, float]]:
        return [await ask(server, port, f"Write a long story with these words: {prompt}.") for prompt in mine]

    begun = time.perf_counter()
    answers = await asyncio.gather(*map(client, prompts))
    return time.perf_counter() - begun, [answer for one in answers for answer in one]


async def ask(server: Server, port: int, prompt: str) -> tuple[str, float]:
    """One streamed answer. Raises CamelidError for a refusal, or a stream that breaks off."""
    message = {"role": "user", "content": prompt}
    asked = {"model": server.model, "messages": [message], "max_tokens": TOKENS, "temperature": 0, "stream": True}
    body = json.dumps(asked).encode()
    begun, first, text, ended = time.perf_counter(), None, "", False
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise CamelidError(f"{status.decode().strip()}: {(await reader.read())[-300:].decode(errors='replace')}")
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        choice = (event.get("choices") or [{}])[0]
        piece = (choice.get("delta") or {}).get("content")
        if piece:
            first = first or time.perf_counter() - begun
            text += piece
        ended = ended or bool(choice.get("finish_reason"))
    writer.close()
    if not ended:
        raise CamelidError("a stream broke off")
    return text, first or time.perf_counter() - begun
