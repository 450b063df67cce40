"""Completion of verbs, actions and options for your shell, or the manual page: both from the help itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from camelid.cli import settings

SHELLS = {
    "bash": 'eval "$(camelid completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(camelid completion zsh)" in ~/.zshrc',
    "fish": "camelid completion fish > ~/.config/fish/completions/camelid.fish",
    "man": "camelid completion man > ~/.local/share/man/man1/camelid.1",
}
BASH = """\
_camelid() {{
  local words=""
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{actions}
  esac
  if [ -z "$words" ]; then case "${{COMP_WORDS[1]}}" in
{verbs}
  esac; fi
  [ "$COMP_CWORD" = 1 ] && words="{names}"
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _camelid camelid
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="; ".join(SHELLS.values()))
    settings.example(parser, SHELLS["bash"])


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    text = {"bash": bash, "zsh": zsh, "fish": fish, "man": manual}[options.shell]()
    if options.json:
        return {"text": text}
    print(text, end="")
    return None


def parsers() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """(verb, action or "", its parser) of everything that runs something."""
    from camelid.cli import VERBS, leaves, parser_of

    for verb in VERBS:
        yield from ((verb, action, leaf) for action, leaf in leaves(parser_of(verb)[1]).items())


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    return [o for action in parser._actions for o in action.option_strings if o.startswith("--")]


def bash() -> str:
    from camelid.cli import VERBS

    actions: list[str] = []
    verbs: dict[str, str] = {}
    for verb, action, parser in parsers():
        words = " ".join(options_of(parser))
        if action:
            actions.append(f'    "{verb} {action}") words="{words}" ;;')
            verbs[verb] = f"{verbs.get(verb, '')} {action}".strip()
        else:
            verbs[verb] = words
    lines = [f'    {verb}) words="{words}" ;;' for verb, words in verbs.items()]
    return BASH.format(actions="\n".join(actions), verbs="\n".join(lines), names=" ".join(VERBS))


def zsh() -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash()}"


def fish() -> str:
    from camelid.cli import VERBS

    lines = [
        f"complete -c camelid -n __fish_use_subcommand -a {verb} -d {_quoted(told)}" for verb, told in VERBS.items()
    ]
    for verb, action, parser in parsers():
        if action:
            lines.append(f"complete -c camelid -n '__fish_seen_subcommand_from {verb}' -a {action}")
        lines += [f"complete -c camelid -n '__fish_seen_subcommand_from {verb}' -l {o[2:]}" for o in options_of(parser)]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As fish quotes, which knows two escapes within single quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def manual() -> str:
    """roff, for man(1)."""
    from camelid import __version__
    from camelid.cli import VERBS

    parts = [
        f'.TH CAMELID 1 "" "camelid {__version__}"', ".SH NAME", "camelid \\- the whole life of a LLaMA model",
        ".SH SYNOPSIS", ".B camelid", "VERB ... [key=value ...] [--json]", ".SH VERBS",
    ]  # fmt: skip
    for verb, action, parser in parsers():
        parts += [f".SS {verb} {action}".rstrip(), _roff(VERBS[verb]) if not action else "", ".nf"]
        parts += [_roff(parser.format_help()), ".fi"]
    status = "0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C."
    return "\n".join(part for part in [*parts, ".SH EXIT STATUS", status] if part) + "\n"


def _roff(text: str) -> str:
    escaped = text.rstrip().replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in escaped.split("\n"))
