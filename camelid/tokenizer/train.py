"""Train a tokenizer of either LLaMA kind on documents, and count how often each token occurs in them.

sentencepiece: LLaMA 1 and 2, BPE over characters with byte fallback, every digit its own token, spaces kept.
byte-level: Llama 3, BPE over bytes after its regular expression.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from camelid.artifact import new_folder, write_manifest
from camelid.errors import InputError, MissingExtra
from camelid.tokenizer import template
from camelid.tokenizer.load import from_sentencepiece
from camelid.tokenizer.patterns import LLAMA3
from camelid.tokenizer.tokenizer import Tokenizer

Kind = Literal["sentencepiece", "byte-level"]
Texts = Callable[[], Iterable[str]]
"""Returns a fresh iterator each time: the corpus is read once to train and once to count."""

BYTE_LEVEL_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip
SMALLEST = {"sentencepiece": 300, "byte-level": 256 + len(BYTE_LEVEL_SPECIALS)}


def train(texts: Texts, out: str | Path, vocab_size: int, kind: Kind, *, corpus: Path | None = None) -> dict[str, Any]:
    """Write the tokenizer folder `out` with `vocab.tsv` (id, token, count). Returns vocab_size, kind, digest, out."""
    if kind not in SMALLEST:
        raise InputError(f"--kind is {kind!r}; choose sentencepiece or byte-level")
    if vocab_size < SMALLEST[kind]:
        raise InputError(f"--vocab-size {vocab_size} is too small: {kind} needs at least {SMALLEST[kind]}")
    with new_folder(Path(out)) as folder:
        trainer = _sentencepiece if kind == "sentencepiece" else _byte_level
        tokenizer = trainer(texts, folder, vocab_size)
        tokenizer.save(folder)
        counts = count(tokenizer, texts())
        _write_vocabulary(tokenizer, counts, folder / "vocab.tsv")
        result = {"vocab_size": len(tokenizer), "kind": kind, "digest": tokenizer.digest()}
        settings = {"vocab_size": vocab_size, "kind": kind}
        facts = {"vocab_size": len(tokenizer), "digest": tokenizer.digest(), "tokens_in_corpus": sum(counts.values())}
        write_manifest(folder, "tokenizer", [corpus] if corpus else [], settings, **facts)
    return {**result, "out": str(out)}


def _byte_level(texts: Texts, folder: Path, vocab_size: int) -> Tokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    from camelid.tokenizer.sentencepiece_model import add_bos

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=BYTE_LEVEL_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    add_bos(backend, BYTE_LEVEL_SPECIALS[0], 0)
    ids = {name: backend.token_to_id(name) for name in BYTE_LEVEL_SPECIALS}
    return Tokenizer(
        backend,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|end_of_text|>"],
        pad_token_id=ids["<|finetune_right_pad_id|>"],
        chat_template=template.LLAMA3,
    )


def _sentencepiece(texts: Texts, folder: Path, vocab_size: int) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtra("sentencepiece", "data", "training a sentencepiece tokenizer") from None
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"sentencepiece cannot make {vocab_size} pieces from this corpus: {error}") from None
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return from_sentencepiece(path, template=template.LLAMA2)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)


def count(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """How often each id occurs in the texts."""
    counts: Counter[int] = Counter()
    iterator = iter(texts)
    while group := list(islice(iterator, 256)):
        for ids in tokenizer.encode_documents(group):
            counts.update(ids)
    return counts


def _write_vocabulary(tokenizer: Tokenizer, counts: Counter[int], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("id\ttoken\tcount\n")
        for token_id in range(len(tokenizer)):
            shown = tokenizer.token(token_id).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
            file.write(f"{token_id}\t{shown}\t{counts[token_id]}\n")
