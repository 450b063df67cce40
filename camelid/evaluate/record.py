"""An evaluation's folder: every figure in result.json, a page to look at, and a manifest that names model and data by
hash. Comparisons and model cards are made from these records only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.artifact import damage, identity, new_folder, read_manifest, write_manifest
from camelid.disk import write_atomic
from camelid.errors import InputError
from camelid.evaluate.perplexity import Scored
from camelid.evaluate.texts import files_of
from camelid.report.page import Page
from camelid.tokenizer.tokenizer import Tokenizer

RESULT = "result.json"
SHOWN_TOKENS = 6000  # of a text in colour
SHOWN_ROWS = 40
BULKY = ("answers", "items", "documents", "samples")  # what a terminal is not shown


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what is kept of each item."""
    return {key: value for key, value in result.items() if key not in BULKY}


def write(
    out: Path, measure: str, result: Mapping[str, Any], measured: Path, data: Sequence[Path],
    tokenizer: Tokenizer | None = None, scored: Sequence[Scored] = (),
) -> None:  # fmt: skip
    """Make the evaluation folder `out` of what was `measured` (a model, or a file of hypotheses) on `data`. Raises
    InputError when something else is there."""
    kept = dict(result) | ({"items": [{"nats": s.nats} for s in scored]} if scored else {})
    files = [file for path in data for file in files_of(path)]
    with new_folder(out, "evaluation") as folder:
        write_atomic(folder / RESULT, json.dumps(kept, ensure_ascii=False) + "\n")
        page(out.name, measure, result, tokenizer, scored).write(folder / "report.html")
        write_manifest(
            folder, "evaluation", [measured, *files], measure=measure, figures=summary(result),
            measured={"name": measured.name, "sha256": identity(measured)},
            data=[{"name": path.name, "sha256": identity(path)} for path in files],
        )  # fmt: skip


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and the result of an evaluation folder. Raises InputError when it is not one, or was changed."""
    manifest = read_manifest(folder)
    if fault := damage(folder):
        raise InputError(fault)
    if manifest["kind"] != "evaluation":
        raise InputError(f"{folder} is a {manifest['kind']} folder: give one that `camelid evaluate … --out` made")
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / RESULT} cannot be read: {error}") from None
    return manifest, result


def page(
    name: str, measure: str, result: Mapping[str, Any], tokenizer: Tokenizer | None, scored: Sequence[Scored] = ()
) -> Page:
    """The figures with their protocol, then what they are made of."""
    made = Page(f"{measure}: {name}")
    made.text(result["protocol"])
    if "warning" in result:
        made.text(f"Warning: {result['warning']}")
    made.table(["figure", "value"], [[k, v] for k, v in numbers(summary(result))])
    if measure == "perplexity":
        _documents(made, result, tokenizer, scored)
    elif "answers" in result:
        _answers(made, result["answers"])
    elif "items" in result:
        _pairs(made, result["items"])
    return made


def numbers(result: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every number of a result, those inside another under both names, as it is shown."""
    found: list[tuple[str, str]] = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            found += numbers(value, f"{prefix}{key} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else f"{value:,}"))
    return found


def _documents(made: Page, result: Mapping[str, Any], tokenizer: Tokenizer | None, scored: Sequence[Scored]) -> None:
    each = sorted(result["documents"], key=lambda d: -d["bits_per_byte"])
    made.heading("Documents, the hardest first")
    rows = [[d["name"], d["tokens"], d["token_perplexity"], d["bits_per_byte"]] for d in each[:SHOWN_ROWS]]
    made.table(["document", "tokens", "token perplexity", "bits per byte"], rows)
    if len(each) > SHOWN_ROWS:
        made.text(f"{len(each) - SHOWN_ROWS:,} more are in {RESULT}.", note=True)
    first = next((s for s in scored if s.nats), None)
    if tokenizer is not None and first is not None:
        made.heading(f"Surprise, token by token: {first.text.name}")
        made.text(
            "The redder, the less the model expected it: from 0 to 16 bits. Point at a token for its bits.", note=True
        )
        text, spans = coloured(first, tokenizer)
        made.heat(text, spans)


def coloured(scored: Scored, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int, float, str]]]:
    """The beginning of a text, and of each of its scored tokens: start, end, heat (1 at 16 bits), and what to say."""
    skipped = len(scored.text.ids) - len(scored.nats)
    places = tokenizer.offsets(scored.text.text)[:SHOWN_TOKENS]
    if [i for i, _, _ in places] != scored.text.ids[: len(places)]:
        return scored.text.text[:SHOWN_TOKENS], []  # a text that was not cut into tokens from its start
    spans: list[tuple[int, int, float, str]] = []
    at = 0
    for (token, start, end), nats in zip(places[skipped:], scored.nats, strict=False):
        bits = nats / math.log(2)
        start = max(start, at)  # tokens may share a character: the last one has it
        if end > start:
            spans.append((start, end, bits / 16, f"{tokenizer.token(token)}: {bits:.2f} bits, p {math.exp(-nats):.2g}"))
            at = end
    return scored.text.text[: places[-1][2] if places else 0], spans


def _answers(made: Page, answers: Sequence[Mapping[str, Any]]) -> None:
    made.heading("Answers")
    keys = [key for key in answers[0] if not isinstance(answers[0][key], list | dict)]
    made.table(keys, [[str(a[key]) for key in keys] for a in answers[:SHOWN_ROWS]])


def _pairs(made: Page, items: Sequence[Mapping[str, Any]]) -> None:
    score = next((key for key, value in items[0].items() if isinstance(value, float)), None)
    made.heading("The pairs, the worst first" if score else "The pairs")
    keys = [key for key in items[0] if isinstance(items[0][key], str | int | float | list)]
    shown = sorted(items, key=lambda item: item[score])[:SHOWN_ROWS] if score else items[:SHOWN_ROWS]
    made.table(
        keys, [["\n".join(map(str, v)) if isinstance(v := item[k], list) else v for k in keys] for item in shown]
    )
