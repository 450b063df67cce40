"""How well a tokenizer fits texts: compression by language, round trip, what its vocabulary holds and never uses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from camelid.disk import make_folder
from camelid.errors import InputError
from camelid.report.page import Page
from camelid.tokenizer.tokenizer import Tokenizer

# Article 1 of the Universal Declaration of Human Rights, and a little code: the sample when no text is given.
SAMPLES = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience "
    "and should act towards one another in a spirit of brotherhood.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ja": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "ar": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "code": "def area(width: float, height: float) -> float:\n    return width * height  # square metres\n",
}
BATCH = 256
SHOWN = 20
PAGE_CHARACTERS = 6000


@dataclass
class Fit:
    """Sums over the texts of one language. `words` are runs between blanks; `whole` is how many characters stand in
    tokens that are text by themselves, not in loose bytes."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0
    whole: int = 0

    def to_dict(self) -> dict[str, float]:
        return {
            "documents": self.documents, "bytes": self.bytes, "tokens": self.tokens,
            "bytes_per_token": self.bytes / max(1, self.tokens),
            "tokens_per_word": self.tokens / max(1, self.words),
            "tokens_per_character": self.tokens / max(1, self.characters),
            "coverage": self.whole / max(1, self.characters),
        }  # fmt: skip


@dataclass
class Inspection:
    """What `inspect` found. `unequal`: the first text that did not come back, or None."""

    languages: dict[str, Fit] = field(default_factory=lambda: defaultdict(Fit))
    counts: Counter[int] = field(default_factory=Counter)
    documents: int = 0
    returned: int = 0
    unequal: str | None = None


def inspect(tokenizer: Tokenizer, texts: Iterable[str], language: Callable[[str], str]) -> Inspection:
    """Encode and decode every text. `language` names the language of one."""
    found = Inspection()
    whole = np.array([_characters(tokenizer, i) for i in range(len(tokenizer))])
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == BATCH:
            _add(found, tokenizer, group, language, whole)
            group = []
    _add(found, tokenizer, group, language, whole)
    return found


def _add(
    found: Inspection, tokenizer: Tokenizer, texts: Sequence[str], language: Callable[[str], str], whole: np.ndarray
) -> None:
    ids, offsets = tokenizer.encode_batch(texts)
    for text, begin, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        own = ids[begin:end]
        fit = found.languages[language(text)]
        fit.documents += 1
        fit.bytes += len(text.encode())
        fit.characters += len(text)
        fit.words += len(text.split())
        fit.tokens += len(own)
        fit.whole += min(len(text), int(whole[own].sum()))
        found.documents += 1
        if tokenizer.decode(own.tolist()) == text:
            found.returned += 1
        elif found.unequal is None:
            found.unequal = text
    found.counts.update(ids.tolist())


def _characters(tokenizer: Tokenizer, token_id: int) -> int:
    """How many whole characters a token stands for; none for a loose byte."""
    name = tokenizer.token(token_id)
    if len(name) == 6 and name.startswith("<0x"):
        return 0
    text = tokenizer.backend.decoder.decode(["x", name]).removeprefix("x") if tokenizer.backend.decoder else name
    return sum(c != "\ufffd" for c in text)


def summary(tokenizer: Tokenizer, found: Inspection, corpus_counts: Mapping[int, int] | None) -> dict[str, Any]:
    """Plain figures. `corpus_counts` are those of vocab.tsv, where there is one; else the texts' own are used."""
    counts = found.counts if corpus_counts is None else corpus_counts
    special = tokenizer.special_tokens
    pieces = {i: tokenizer.token(i) for i in range(len(tokenizer)) if i not in special}
    unused = [i for i in pieces if not counts.get(i)]
    varied = [i for i in pieces if len(set(pieces[i])) > 3]  # not the rulers and indents that every vocabulary has
    longest = sorted(varied, key=lambda i: (-len(pieces[i]), i))[:SHOWN]
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "special_tokens": {str(i): t for i, t in sorted(special.items())},
        "chat_template": tokenizer.chat_template is not None,
        "digest": tokenizer.digest(),
        "languages": {name: fit.to_dict() for name, fit in sorted(found.languages.items())},
        "round_trip": {"documents": found.documents, "returned": found.returned},
        "unused": {"counted_in": "the training corpus" if corpus_counts is not None else "these texts",
                   "count": len(unused), "first": [pieces[i] for i in unused[:SHOWN]]},
        "longest": [pieces[i] for i in longest],
        "commonest": [[pieces[i], n] for i, n in Counter(counts).most_common(SHOWN) if i in pieces],
    }  # fmt: skip


def read_counts(folder: Path) -> dict[int, int] | None:
    """Counts of a folder's vocab.tsv, or None."""
    path = folder / "vocab.tsv"
    if not path.is_file():
        return None
    rows = (line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").split("\n")[1:] if line)
    return {int(head.split("\t", 1)[0]): int(count) for head, count in rows}


def check_page(path: Path) -> None:
    """Raise InputError where a page would take the place of something else, or of a folder."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: --out names a file, as {path / 'tokenizer.html'}")
    if path.exists() and "<title>Tokenizer</title>" not in path.read_text(encoding="utf-8", errors="replace")[:4096]:
        raise InputError(f"{path} exists and is no page that camelid made: choose another --out, or remove it")
    make_folder(path.resolve().parent)


def write_page(path: Path, tokenizer: Tokenizer, facts: Mapping[str, Any], texts: Sequence[str]) -> None:
    """The figures, and the texts' beginnings with every token in a colour of its own."""
    page = Page("Tokenizer")
    trip = facts["round_trip"]
    page.text(f"{facts['vocab_size']:,} tokens, digest {facts['digest'][:12]}. {trip['returned']:,} of "
              f"{trip['documents']:,} texts came back letter for letter from their ids.")  # fmt: skip
    page.heading("Languages")
    columns = ("documents", "bytes_per_token", "tokens_per_word", "tokens_per_character")
    rows = [(name, *(f[c] for c in columns), 100 * f["coverage"]) for name, f in facts["languages"].items()]
    page.table(["language", "texts", "bytes / token", "tokens / word", "tokens / character", "% in whole tokens"], rows)
    page.text("A word is what stands between blanks: for Chinese and Japanese look at tokens per character.", note=True)
    page.heading("Token by token")
    page.text("Point at a token to see its id.", note=True)
    for text in texts:
        shown = text[:PAGE_CHARACTERS]
        spans = [(start, end, f"{i}: {tokenizer.token(i)}") for i, start, end in tokenizer.offsets(shown)]
        page.spans(shown, joined(spans))
    page.heading("Vocabulary")
    unused = facts["unused"]
    page.text(
        f"{unused['count']:,} tokens never occur in {unused['counted_in']}. The first: {' '.join(unused['first'])}"
    )
    page.text(f"The longest: {' '.join(facts['longest'])}")
    page.bars("Commonest", [(str(name), int(n)) for name, n in facts["commonest"]])
    page.write(path)


def joined(spans: Sequence[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Tokens that share a character shown as one stretch."""
    out: list[tuple[int, int, str]] = []
    for start, end, label in spans:
        if out and start < out[-1][1]:
            first, last, before = out.pop()
            out.append((first, max(last, end), f"{before} {label}"))
        else:
            out.append((start, end, label))
    return out
