"""What on this machine makes camelid slow or leaves a part of it out, what that costs, and the fix."""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    settings.example(parser, "camelid doctor")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.doctor import examine

    result = examine()
    if not options.json:
        for finding in result["findings"]:
            print(f"{finding['status']:<8} {finding['name']:<16} {finding['detail']}")
            if finding["fix"]:
                print(f"{'':<8} {'':<16} -> {finding['fix']}")
    return result
