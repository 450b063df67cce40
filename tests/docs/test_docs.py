"""What the documentation says: its commands are ours, its links lead somewhere, and the tour runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from camelid import cli
from camelid.recipe import load

from ..test_architecture import FLOORS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench" / "README.md"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[str]:
    """The commands of ours in a page's shell blocks, without what is piped into them."""
    found = []
    for block in blocks(page, "bash", "sh"):
        text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.S | re.M).replace("\\\n", " ")
        for line in text.splitlines():
            at = re.search(r"(?:^|[|] |-m )camelid (\S.*)", line)
            if at and "…" not in at[1]:
                found.append(at[1])
    return found


EVERY = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), EVERY, ids=[f"{page}: {command}" for page, command in EVERY])
def test_every_command_is_one_of_ours(page: str, command: str) -> None:
    """Its verb, options and settings are known; where it names a recipe of ours, the recipe takes the settings."""
    words = shlex.split(command, comments=True)
    words = words[: words.index("|")] if "|" in words else words
    if words in (["-h"], ["--version"]):
        return
    _, options = cli.parse(words)
    recipe = getattr(options, "recipe", None)
    if recipe and (ROOT / recipe).is_file():
        prefix = "corpus." if words[0] == "corpus" else ""
        load(ROOT / recipe, [f"{prefix}{setting}" for setting in options.settings if "=" in setting])


def test_there_are_commands_and_a_wrong_one_is_noticed() -> None:
    assert len(EVERY) > 100
    for wrong in (["chatt", "x"], ["chat", "x", "--tempreature", "1"], ["pretrain", "x.toml", "--out", "y"]):
        with pytest.raises(cli.InputError):
            cli.parse(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("name", ["README", "docs/tour", "docs/howto"])
def test_both_languages_have_the_same_commands(name: str) -> None:
    english, chinese = (ROOT / f"{name}.md", ROOT / f"{name.replace('README', 'README.zh-CN')}.md")
    if name != "README":
        chinese = ROOT / f"{name}.zh.md"
    plain = [[re.sub(r"\s+#.*", "", command) for command in commands(page)] for page in (english, chinese)]
    assert plain[0] == plain[1]
    code = [[re.sub(r"#.*", "", block) for block in blocks(page, "python")] for page in (english, chinese)]
    assert code[0] == code[1]


def test_the_floors_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| ([^|]*) \|", text, re.M)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == [floor - {"__main__"} for floor in FLOORS]


def test_the_tour_runs(tmp_path: Path) -> None:
    """Every block, in order, in one shell each, in an empty folder."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "LIB": ""}
    ran = 0
    for language, body in BLOCK.findall((ROOT / "docs" / "tour.md").read_text(encoding="utf-8")):
        found = re.search(r"^LIB=.*$", body, re.M)
        if found:
            environment["LIB"] = subprocess.run(
                ["bash", "-c", f"{found[0]}; printf %s $LIB"],
                capture_output=True,
                text=True,
                env=environment,
                check=True,
            ).stdout
        command = ["bash", "-e", "-o", "pipefail", "-c", body] if language == "bash" else [sys.executable, "-c", body]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
        assert done.returncode == 0, f"{body}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 9
    assert (tmp_path / "chat.gguf").stat().st_size > 10_000
