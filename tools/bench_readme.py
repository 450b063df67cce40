"""Write the tables of bench/README.md from what `camelid bench … --json` printed into bench/*.json, between the marks
`<!-- NAME -->` and `<!-- end -->`; no figure is copied by hand. `--check` fails when a table is not what its file
says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1] / "bench"
MARK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.S)


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rows_of(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each task and number of threads: ours, the best peer's and their ratio, then every peer's."""
    lines = []
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        if "error" not in row:
            groups.setdefault((row["task"], row.get("threads", 0)), []).append(row)
    for row in found["rows"]:  # what failed has no single task, and none at all may have been run
        if "error" in row:
            for (task, threads), rows in groups.items():
                if task.startswith(row["task"]) and threads == row.get("threads", threads):
                    rows.append(row)
    for (task, threads), rows in groups.items():
        good = [row for row in rows if "error" not in row]
        ours = [row for row in good if row["implementation"].startswith("camelid")]
        peers = sorted((row for row in good if row not in ours), key=lambda row: -row["value"])
        own = " / ".join(figure(row["value"]) for row in ours)
        others = ", ".join(f"{named(row)} {figure(row['value'])}" for row in peers)
        missing = [row["implementation"] for row in rows if "error" in row]
        others += f" (not run: {', '.join(missing)})" if missing else ""
        ratio = f"{ours[0]['value'] / peers[0]['value']:.2f}" if ours and peers else ""
        if good:
            unit = good[0]["unit"].replace("tokens/s", "tok/s")
            lines.append((task, str(threads or ""), f"{own} {unit}", ratio, others))
    return lines


def named(row: dict[str, Any]) -> str:
    name, version = row["implementation"], str(row.get("version", "")).split(" ")[0].rpartition("==")[2]
    return name if not version or version in name else f"{name} [{version}]"


def table(name: str) -> str:
    found = json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))
    header = ("task", "threads", "camelid", "to the best peer", "peers")
    lines = [header, ("---", "---:", "---:", "---:", "---"), *rows_of(found)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    limits = "; ".join(f"{what}: {value}" for what, value in found.get("limits", {}).items())
    return f"\n{text}\n" + (f"Limits: {limits}.\n\n" if limits else "")


def main() -> None:
    page = BENCH / "README.md"
    before = page.read_text(encoding="utf-8")
    after = MARK.sub(lambda match: match[1] + table(match[2]) + match[3], before)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if before == after else f"{page} is not what its figures say: python tools/bench_readme.py")
    page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
