"""The quickstart's report: figures first, then curves, then what the model wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camelid.report.page import Curve, Page
from camelid.train.log import applied


def write_report(folder: Path, result: dict[str, Any]) -> None:
    """`report.html` in `folder`, self-contained."""
    page = Page("camelid quickstart")
    base, tuned = result["pretrain"], result["finetune"]
    counts = result["corpus"]["documents"]
    page.text(
        f"From raw text to answers in {result['seconds'] / 60:.1f} minutes: {counts['kept']:,} modules of the Python "
        f"standard library, {result['tokens']['tokens']:,} tokens; {base['steps']:,} steps of pre-training at "
        f"{base['tokens_per_second']:,.0f} tokens/s, {tuned['steps']:,} steps of fine-tuning."
    )
    _compression(page, result["compression"])
    _docstrings(page, result["docstrings"])
    for run, title in (("base", "Pre-training loss, nats per token"), ("tuned", "Fine-tuning loss, nats per token")):
        records = applied(folder / run)
        steps = [float(r["step"]) for r in records]
        page.plot(title, [Curve("loss", steps, [r["loss"] for r in records])], x="step")
    page.heading("The pre-trained model goes on from “def read_lines(path):”")
    page.pre(result["sample"]["prompt"] + result["sample"]["text"])
    _examples(page, result["docstrings"]["examples"])
    page.write(folder / "report.html")


def _compression(page: Page, figures: dict[str, Any]) -> None:
    page.heading("Held-out modules, bits per byte (lower is better)")
    rows = [("pre-trained model", figures["model"]["bits_per_byte"])]
    rows += [(name, value) for name, value in figures.items() if name != "model"]
    rows.sort(key=lambda r: r[1])
    page.table(["", "bits per byte"], rows, best=0)
    page.text(
        f"{figures['model']['bytes']:,} bytes of whole modules that training never saw. "
        f"{figures['model']['protocol']}. The compressors see the same bytes as one stream.",
        note=True,
    )


def _docstrings(page: Page, figures: dict[str, Any]) -> None:
    page.heading("Docstrings for functions of held-out modules (higher is better)")
    rows = [
        (name, s["bleu"]["bleu"]["score"], s["bleu"]["chrf"]["score"], 100 * s["rouge"]["rouge1"]["fmeasure"],
         100 * s["rouge"]["rougeL"]["fmeasure"])
        for name, s in figures["scores"].items()
    ]  # fmt: skip
    best = max(range(len(rows)), key=lambda i: rows[i][4])
    page.table(["", "BLEU", "chrF", "ROUGE-1", "ROUGE-L"], rows, best=best)
    first = next(iter(figures["scores"].values()))
    page.text(
        f"{figures['functions']} functions; {first['bleu']['bleu']['signature']}; {first['rouge']['protocol']}.",
        note=True,
    )


def _examples(page: Page, examples: list[dict[str, Any]]) -> None:
    page.heading("What it wrote, beside what the authors wrote")
    step = max(1, len(examples) // 12)
    rows = [(f"{e['name']} ({e['source']})", e["fine-tuned model"], e["written"]) for e in examples[::step]]
    page.table(["function", "the model", "the author"], rows)
