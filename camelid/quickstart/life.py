"""The stages of the quickstart, each the same call that its verb makes."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from camelid.artifact import MANIFEST, kind_of, write_manifest
from camelid.corpus import build as build_corpus
from camelid.corpus import documents
from camelid.disk import write_atomic
from camelid.errors import InputError, MissingExtra
from camelid.quickstart.baselines import Nearest, name_as_words
from camelid.quickstart.source import Pair, find_sources, pairs, split, standard_library, unseen, words
from camelid.recipe import CorpusSection, Recipe, parse

SEED = 1
# In a few minutes on two cores a small model that sees more text beats a larger one, and Muon beats AdamW by far:
# docs/decisions.md has the figures.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
VOCAB_SIZE = 4096
PRETRAIN_SHARE, FINETUNE_SHARE = 0.62, 0.22  # of the minutes; the rest is preparing and measuring
JUDGED = 200
NEEDED = (("pyarrow", "data"), ("sacrebleu", "evaluate"), ("nltk", "evaluate"))
MADE = ("corpus", "held-out", "tokenizer", "tokens", "base", "tuned", "docstrings.jsonl", "report.html", "results.json",
        MANIFEST)  # fmt: skip


def prompt(pair: Pair) -> str:
    """The question the model is fine-tuned to answer. The name is spelled as words too: a small model copies words
    more easily than it takes identifiers apart."""
    return f"Write the docstring of {' '.join(words(pair.name))}.\n\n{pair.code}"


def run(out: str | Path, minutes: float, quiet: bool = False) -> dict[str, Any]:
    """Live the whole life in the folder `out`, in about `minutes`. Returns every figure of the report."""
    if minutes <= 0:
        raise InputError(f"--minutes must be above 0, not {minutes}")
    for package, extra in NEEDED:  # told now, not when all but the measuring is done
        if find_spec(package) is None:
            raise MissingExtra(package, extra, "the quickstart")
    folder = Path(out).resolve()
    _fresh(folder)
    started, number = time.monotonic(), 0

    def stage(text: str) -> None:
        nonlocal number
        number += 1
        if not quiet:
            print(f"[{number}/8] {time.monotonic() - started:4.0f} s  {text}", file=sys.stderr, flush=True)

    root = standard_library()
    stage(f"reading the standard library at {root}")
    train_files, held_files = split(find_sources(root), root, SEED)
    # Addresses in code are examples, and near copies are the library's own business: only exact copies go.
    settings = CorpusSection(mask_pii=False, deduplicate="exact", workers=1)
    corpus = build_corpus(train_files, folder / "corpus", settings, quiet=quiet)
    build_corpus(held_files, folder / "held-out", settings, quiet=quiet)
    train_pairs = pairs(train_files)
    held_pairs = unseen(pairs(held_files), train_pairs)

    stage(f"training a tokenizer of {VOCAB_SIZE:,} tokens")
    tokens = _tokenize(folder)
    stage(f"pre-training on {tokens['tokens']:,} tokens")
    base = _pretrain(folder, minutes * PRETRAIN_SHARE, quiet)
    stage("measuring held-out bits per byte")
    compression = _compression(folder, base["checkpoint"], quiet)
    stage(f"fine-tuning on {len(train_pairs):,} functions and their docstrings")
    tuned = _finetune(folder, base["checkpoint"], train_pairs, minutes * FINETUNE_SHARE, quiet)
    stage(f"writing docstrings for {min(JUDGED, len(held_pairs))} functions of held-out modules")
    docstrings = _docstrings(folder, train_pairs, held_pairs, tuned["checkpoint"])
    stage("a sample of the pre-trained model")
    sample = _sample(base["checkpoint"])

    result = {
        "corpus": corpus, "tokens": tokens, "pretrain": base, "finetune": tuned, "compression": compression,
        "docstrings": docstrings, "sample": sample, "seconds": time.monotonic() - started,
    }  # fmt: skip
    stage("writing the report")
    from camelid.quickstart.page import write_report

    write_report(folder, result)
    write_atomic(folder / "results.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_manifest(folder, "quickstart", [Path(tuned["checkpoint"])], {"minutes": minutes}, only=MADE, seed=SEED)
    return result | {"report": str(folder / "report.html"), "model": str(folder / "tuned")}


def _fresh(folder: Path) -> None:
    """An empty folder: an earlier quickstart there, whole or not, is replaced, anything else is left alone."""
    if folder.is_file():
        raise InputError(f"{folder} is a file: choose another --out")
    ours = (folder / ".quickstart").exists() or ((folder / MANIFEST).exists() and kind_of(folder) == "quickstart")
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise InputError(f"{folder} exists and is not a quickstart: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".quickstart").touch()  # first: what is left of one that is killed here is known as ours
    for path in [*folder.iterdir()]:  # what a person put beside it stays
        if path.name in MADE or any(path.name.startswith(f".{name}.") for name in MADE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _tokenize(folder: Path) -> dict[str, Any]:
    from camelid.tokenizer.load import from_folder
    from camelid.tokenizer.train import train
    from camelid.tokens.write import build

    corpus, tokenizer = folder / "corpus", folder / "tokenizer"
    train(lambda: documents(corpus), tokenizer, VOCAB_SIZE, "byte-level", corpus=corpus)
    return build(documents(corpus), from_folder(tokenizer), folder / "tokens", [corpus, tokenizer])


def _recipe(out: Path, minutes: float, length: int, rate: float, **sections: Any) -> Recipe:
    train = {
        "minutes": minutes,
        "sequence_length": length,
        "global_batch_tokens": 1024,
        "optimizer": "muon",
        "learning_rate": rate,
        "muon_learning_rate": 5 * rate,
        "warmup_steps": 40,
        "min_learning_rate_share": 0.02,
        "seed": SEED,
    }
    return parse({"train": train, "log": {"out": str(out)}, "checkpoint": {"keep": 2}, **sections})


def _pretrain(folder: Path, minutes: float, quiet: bool) -> dict[str, Any]:
    from camelid.train import pretrain
    from camelid.train.guard import check_whole

    sections = {"model": SHAPE, "data": {"tokens": str(folder / "tokens")}}
    result = pretrain(_recipe(folder / "base", minutes, 256, 4e-3, **sections), quiet=quiet)
    check_whole(result)
    return result


def _finetune(folder: Path, base: str, training: Sequence[Pair], minutes: float, quiet: bool) -> dict[str, Any]:
    from camelid.finetune import finetune
    from camelid.train.guard import check_whole

    path = folder / "docstrings.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for pair in training:
            print(json.dumps({"prompt": prompt(pair), "completion": pair.docstring}), file=file)
    sections = {"model": {"from": base}, "data": {"files": [str(path)]}, "finetune": {"method": "full"}}
    result = finetune(_recipe(folder / "tuned", minutes, 512, 2e-3, **sections), quiet=quiet)
    check_whole(result)
    return result


def _compression(folder: Path, model_path: str, quiet: bool) -> dict[str, Any]:
    """Bits per byte of the held-out modules under the model, and under two compressors on the very same bytes."""
    import torch

    from camelid.evaluate import perplexity
    from camelid.formats.load import load, load_tokenizer
    from camelid.model.llama import Llama

    texts = list(documents(folder / "held-out"))
    model: Llama = load(model_path, dtype=torch.float32)
    measured = perplexity(model, load_tokenizer(model_path), texts, window=256, stride=128, quiet=quiet)
    raw = "".join(texts).encode()
    # One stream over all modules: kinder to the compressors, which then learn across files.
    squeezed = {"gzip -9": len(gzip.compress(raw, 9)), "xz -9": len(lzma.compress(raw, preset=9))}
    return {"model": measured, **{name: 8 * size / len(raw) for name, size in squeezed.items()}}


def _docstrings(folder: Path, training: Sequence[Pair], held_out: Sequence[Pair], model_path: str) -> dict[str, Any]:
    import torch

    from camelid.evaluate import bleu, rouge
    from camelid.generate.engine import Engine
    from camelid.generate.sampling import SamplingParams

    chosen = held_out[:: max(1, len(held_out) // JUDGED)][:JUDGED]
    engine = Engine.from_pretrained(model_path, dtype=torch.float32)
    assert engine.tokenizer is not None
    asked = [engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt(p).strip()}]) for p in chosen]
    fitting = [(p, ids) for p, ids in zip(chosen, asked, strict=True) if len(ids) <= 450]
    chosen = [p for p, _ in fitting]
    results = engine.generate([ids for _, ids in fitting], SamplingParams(max_new_tokens=48))
    nearest = Nearest(training)
    systems = {
        "fine-tuned model": [r.text.strip() or "." for r in results],
        "nearest training docstring": [nearest(p) for p in chosen],
        "function name as words": [name_as_words(p) for p in chosen],
    }
    references = [[p.docstring for p in chosen]]
    scores = {
        name: {
            "bleu": bleu(texts, references, bootstrap=500, ter=False),
            "rouge": rouge(texts, references, bootstrap=500),
        }
        for name, texts in systems.items()
    }
    shown = [
        {"name": p.name, "code": p.code, "written": p.docstring, "source": Path(p.source).name,
         **{name: texts[i] for name, texts in systems.items()}}
        for i, p in enumerate(chosen)
    ]  # fmt: skip
    return {"functions": len(chosen), "scores": scores, "examples": shown}


def _sample(model_path: str) -> dict[str, str]:
    import torch

    from camelid.generate.engine import Engine
    from camelid.generate.sampling import SamplingParams

    start = "def read_lines(path):\n"
    engine = Engine.from_pretrained(model_path, dtype=torch.float32)
    params = SamplingParams(max_new_tokens=120, temperature=0.7, top_p=0.95, seed=SEED)
    return {"prompt": start, "text": engine.generate([start], params)[0].text}
