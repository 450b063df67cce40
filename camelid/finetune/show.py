"""What a model would learn of its examples, for a person to look at: the learned tokens in colour."""

from __future__ import annotations

from collections.abc import Sequence

from camelid.finetune.conversation import Example
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import IGNORE

LEARNED, CONTROL, OFF = "\x1b[30;42m", "\x1b[1;30;43m", "\x1b[0m"


def shown(examples: Sequence[Example], tokenizer: Tokenizer, colour: bool = True) -> str:
    """Each example as text: learned tokens green, learned control tokens yellow; in brackets where there are no
    colours. A line of counts after each."""
    found = []
    for number, example in enumerate(examples, 1):
        text = "".join(_run(ids, learned, tokenizer, colour) for ids, learned in _runs(example, tokenizer))
        count = example.learned()
        found.append(f"{text}\n--- example {number}: {count} of {len(example.ids)} tokens are learned\n")
    return "\n".join(found)


def _runs(example: Example, tokenizer: Tokenizer) -> list[tuple[list[int], str]]:
    """Neighbouring tokens of one kind together: "", "learned" or "control"."""
    special = tokenizer.special_tokens
    runs: list[tuple[list[int], str]] = []
    for token, label in zip(example.ids, example.labels, strict=True):
        kind = "" if label == IGNORE else "control" if token in special else "learned"
        if runs and runs[-1][1] == kind:
            runs[-1][0].append(token)
        else:
            runs.append(([token], kind))
    return runs


def _run(ids: list[int], kind: str, tokenizer: Tokenizer, colour: bool) -> str:
    text = tokenizer.decode(ids)
    if not kind:
        return text
    if not colour:
        return f"⟦{text}⟧"
    # A line break in colour would paint the rest of the line.
    return "\n".join(f"{CONTROL if kind == 'control' else LEARNED}{line}{OFF}" for line in text.split("\n"))
