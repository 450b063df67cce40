"""Check a model: what is silently wrong with it, if anything. Exit 1 when a check fails."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings

MARKS = {"pass": "✓", "fail": "✗", "not_applicable": "–"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--against", choices=("transformers",), help="compare logits with this, in its own process")
    parser.add_argument("--deep", action="store_true", help="also a long text and rounded forms: minutes")
    settings.example(parser, "camelid verify runs/sft --deep")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.errors import ChecksFailed
    from camelid.verify import behaviour, deep, language, stored
    from camelid.verify.checklist import Subject
    from camelid.verify.checklist import run as run_checks

    checks = [*stored.CHECKS, *language.CHECKS, *behaviour.CHECKS]
    checks += deep.CHECKS if options.deep else []
    checks += [deep.TRANSFORMERS] if options.against else []
    found = []
    for one in run_checks(Subject(options.model), checks):
        found.append(one)
        if not options.json:
            print(f"{MARKS[one.status]} {one.name:<12} {one.detail}", flush=True)
            if one.status == "fail":
                print(f"  {'':<12} this catches: {one.catches}")
    failed = [one.name for one in found if one.status == "fail"]
    result = {"ok": not failed, "model": options.model, "checks": [vars(one) for one in found]}
    if failed:
        message = f"{options.model}: {len(failed)} of {len(found)} checks failed: {', '.join(failed)}"
        raise ChecksFailed(message, result)
    if not options.json:
        passed = sum(one.status == "pass" for one in found)
        print(f"{passed} checks passed, {len(found) - passed} did not apply", file=sys.stderr)
    return result
