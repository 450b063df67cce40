"""The page: all of it in the package, nothing from elsewhere, a word for everything in both languages."""

from __future__ import annotations

import re
from importlib import resources

import httpx
import pytest

from camelid.serve.auth import PAGE

from .conftest import Running

FOLDER = resources.files("camelid.serve").joinpath("page")
FILES = {name: FOLDER.joinpath(name).read_text(encoding="utf-8") for name in (*PAGE, "index.html")}


def words(language: str) -> set[str]:
    block = re.search(rf"^  {language}: \{{\n(.*?)^  \}},", FILES["words.js"], re.S | re.M)
    assert block
    return set(re.findall(r"\b(\w+): (?:\"|\()", block[1]))


def test_every_file_is_served_and_listed(running: Running) -> None:
    assert {entry.name for entry in FOLDER.iterdir()} == set(FILES)
    for name in PAGE:
        answer = httpx.get(f"{running.base}/page/{name}")
        assert answer.text == FILES[name]
        assert answer.headers["content-type"].startswith("text/javascript" if name.endswith("js") else "text/css")
    page = httpx.get(running.base)
    assert page.text == FILES["index.html"]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_comes_from_elsewhere(name: str) -> None:
    assert not re.search(r"""(src|href|import|url\(|fetch\()\s*[=(]?\s*["'](https?:)?//""", FILES[name])
    assert "innerHTML" not in FILES[name]  # what a model writes is never parsed
    assert "eval(" not in FILES[name]


def test_imports_are_files_of_the_page() -> None:
    for name, text in FILES.items():
        for found in re.findall(r'"/page/([\w.]+)"', text):
            assert found in FILES, (name, found)


def test_both_languages_have_every_word() -> None:
    assert words("en") == words("zh")
    used = set(re.findall(r'data-(?:word|label|placeholder)="(\w+)"', FILES["index.html"]))
    used |= {found for text in FILES.values() for found in re.findall(r'\bword\("(\w+)"\)', text)}
    used |= set(re.findall(r'\bact\("(\w+)"', FILES["page.js"]))
    assert used <= words("en")
    assert len(used) > 25


def test_every_id_that_is_looked_up_is_there() -> None:
    there = set(re.findall(r'\bid="(\w+)"', FILES["index.html"]))
    assert set(re.findall(r'\bat\("(\w+)"\)', FILES["page.js"])) <= there
