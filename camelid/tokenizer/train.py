"""Train a tokenizer of either LLaMA kind on documents, and count how often each token occurs in them.

sentencepiece: LLaMA 1 and 2, BPE over characters with byte fallback, every digit its own token, spaces kept.
byte-level: Llama 3, BPE over bytes after its regular expression.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from camelid.artifact import new_folder, write_manifest
from camelid.errors import InputError, MissingExtra
from camelid.report.progress import followed
from camelid.tokenizer import byte_level, template
from camelid.tokenizer.load import from_sentencepiece
from camelid.tokenizer.sample import Sample
from camelid.tokenizer.tokenizer import Tokenizer

Kind = Literal["sentencepiece", "byte-level"]
Texts = Callable[[], Iterable[str]]
"""Returns a fresh iterator each time: the corpus is read once to train and once to count."""

BYTE_LEVEL_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip
RESERVED = "<|reserved_special_token_{}|>"
DEFAULT_RESERVED = {"sentencepiece": 0, "byte-level": 10}
MAX_BYTES = 4_000_000_000  # of text to learn from; its distinct pieces take a few GB
LLAMA_COVERAGE = 0.99995  # of a text, by characters that get a piece each
MAX_LINE = 1 << 20  # bytes; sentencepiece leaves longer lines out


def train(
    texts: Texts,
    out: str | Path,
    vocab_size: int,
    kind: Kind,
    *,
    reserved: int | None = None,
    threads: int | None = None,
    max_bytes: int = MAX_BYTES,
    character_coverage: float | None = None,
    corpus: Path | None = None,
    corpus_bytes: int = 0,
    quiet: bool = True,
) -> dict[str, Any]:
    """Write the tokenizer folder `out` with `vocab.tsv` (id, token, count). Returns vocab_size, kind, digest, out.

    reserved: control tokens kept free for later. max_bytes: of a larger corpus (`corpus_bytes` says how large it is)
    an even sample of documents is learned from; the counts are over all of it. Any number of threads gives the same.
    character_coverage (sentencepiece; by default LLaMA's): the share of the text whose characters get a piece each; the
    rarest, which make up the rest, are written as bytes.
    """
    reserved = DEFAULT_RESERVED.get(kind, 0) if reserved is None else reserved
    _check(kind, vocab_size, reserved)
    if character_coverage is not None and kind == "byte-level":
        raise InputError("--character-coverage is for --kind sentencepiece: a byte-level tokenizer has all characters")
    coverage = LLAMA_COVERAGE if character_coverage is None else character_coverage
    if not 0.9 <= coverage <= 1:
        raise InputError(f"--character-coverage {coverage} is not between 0.9 and 1")
    sample = Sample(min(1.0, max_bytes / corpus_bytes) if corpus_bytes else 1.0)
    with new_folder(Path(out), "tokenizer") as folder:
        learn = partial(_sentencepiece, coverage=coverage) if kind == "sentencepiece" else _byte_level
        used = sample(followed(texts(), "learning", corpus_bytes, quiet))
        tokenizer = learn(used, folder, vocab_size, reserved, threads)
        tokenizer.save(folder)
        counts = count(tokenizer, followed(texts(), "counting", corpus_bytes, quiet))
        write_vocabulary(tokenizer, counts, folder / "vocab.tsv")
        result = {"vocab_size": len(tokenizer), "kind": kind, "digest": tokenizer.digest()}
        settings: dict[str, Any] = {
            "vocab_size": vocab_size,
            "kind": kind,
            "reserved": reserved,
            "max_bytes": max_bytes,
        }
        settings |= {"character_coverage": coverage} if kind == "sentencepiece" else {}
        facts: dict[str, Any] = {
            "vocab_size": len(tokenizer), "digest": tokenizer.digest(), "tokens_in_corpus": int(counts.sum()),
            "sample": sample.to_dict(),
        }  # fmt: skip
        write_manifest(folder, "tokenizer", [corpus] if corpus else [], settings, **facts)
    return {**result, "tokens_in_corpus": int(counts.sum()), "sample": sample.to_dict(), "out": str(out)}


def _check(kind: str, vocab_size: int, reserved: int) -> None:
    smallest = {"sentencepiece": 300 + reserved, "byte-level": 256 + len(BYTE_LEVEL_SPECIALS) + reserved}
    if kind not in smallest:
        raise InputError(f"--kind is {kind!r}; choose sentencepiece or byte-level")
    if reserved < 0:
        raise InputError(f"--reserved {reserved} is negative")
    if vocab_size < smallest[kind]:
        raise InputError(f"--vocab-size {vocab_size} is too small: {kind} needs at least {smallest[kind]}")


def _byte_level(texts: Iterable[str], folder: Path, vocab_size: int, reserved: int, threads: int | None) -> Tokenizer:
    from camelid.tokenizer.sentencepiece_model import add_bos

    specials = [*BYTE_LEVEL_SPECIALS, *(RESERVED.format(i) for i in range(reserved))]
    backend = byte_level.learn(texts, vocab_size, specials, threads)
    add_bos(backend, specials[0], 0)
    ids = {name: backend.token_to_id(name) for name in specials}
    return Tokenizer(
        backend,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|end_of_text|>"],
        pad_token_id=ids["<|finetune_right_pad_id|>"],
        chat_template=template.LLAMA3,
    )


def _sentencepiece(
    texts: Iterable[str], folder: Path, vocab_size: int, reserved: int, threads: int | None, coverage: float
) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtra("sentencepiece", "data", "training a sentencepiece tokenizer") from None
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=[RESERVED.format(i) for i in range(reserved)],
            num_threads=threads or 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_why(error, vocab_size)) from None
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return from_sentencepiece(path, template=template.LLAMA2)


def _why(error: RuntimeError, vocab_size: int) -> str:
    if found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return (
            f"--vocab-size {vocab_size} is too small for this corpus: its characters alone, with the bytes, "
            f"are {found[1]} pieces. Raise it above that, write the rarest as bytes (--character-coverage 0.999), or "
            "use --kind byte-level"
        )
    return f"sentencepiece cannot make {vocab_size} pieces from this corpus: {error}"


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, the unit of sentencepiece; without NUL, which it reserves."""
    for text in texts:
        yield from (line for line in text.replace("\0", "").split("\n") if line)


def count(tokenizer: Tokenizer, texts: Iterable[str]) -> NDArray[np.int64]:
    """How often each id occurs in the texts: int64 [vocab_size]."""
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for ids, _ in tokenizer.encode_stream(texts):
        counts += np.bincount(ids, minlength=len(counts))
    return counts


def write_vocabulary(tokenizer: Tokenizer, counts: NDArray[np.int64], path: Path) -> None:
    """`vocab.tsv`: id, token as stored (tab, newline and backslash escaped), count."""
    with path.open("w", encoding="utf-8") as file:
        file.write("id\ttoken\tcount\n")
        for token_id in range(len(tokenizer)):
            shown = tokenizer.token(token_id).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
            file.write(f"{token_id}\t{shown}\t{counts[token_id]}\n")
