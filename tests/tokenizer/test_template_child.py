"""A template in a process of its own: the same text, and an end to what would not end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camelid.errors import FormatError
from camelid.tokenizer.template import NAMED, render
from camelid.tokenizer.template_child import TemplateChild, can_be_limited

pytestmark = pytest.mark.skipif(not can_be_limited(), reason="this system has no alarms")
FOREVER = f"{'{% for a in range(99999) %}' * 3}{'{% endfor %}' * 3}"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def child() -> Iterator[TemplateChild]:
    made = TemplateChild(seconds=1.0)
    yield made
    made.close()


ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text()}), max_size=5)


@given(messages=MESSAGES, name=st.sampled_from(sorted(NAMED)))
def test_the_same_text_or_the_same_refusal(child: TemplateChild, messages: list[dict[str, Any]], name: str) -> None:
    words = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}

    def outcome(how: Any) -> str:
        try:
            return f"text {how(NAMED[name], messages, **words)}"
        except FormatError as error:
            return f"fault {error}"

    assert outcome(child) == outcome(render)


@pytest.mark.parametrize(
    "template",
    [FOREVER, "{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"],
    ids=["time", "memory"],
)
def test_what_does_not_end_is_ended(child: TemplateChild, template: str) -> None:
    began = time.monotonic()
    with pytest.raises(FormatError, match=r"was stopped|cannot be applied: MemoryError"):
        child(template, USER)
    assert time.monotonic() - began < 30  # of an hour, or of all memory
    assert child("{{ messages[0]['content'] }}", USER) == "Hi"


def test_faults_of_any_kind_are_told(child: TemplateChild) -> None:
    for template in (
        "{{ 1 // 0 }}",
        "{{ [].pop() }}",
        "{{ ''.missing.more }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ):
        for how in (render, child):
            with pytest.raises(FormatError, match="cannot be applied"):
                how(template, USER)


def test_a_child_that_was_killed_is_replaced_and_a_closed_one_is_not(child: TemplateChild) -> None:
    other = TemplateChild()
    assert other._child is not None
    os.kill(other._child.pid, signal.SIGKILL)
    other._child.wait()
    assert other("{{ 1 }}", USER) == "1"
    last = other._child
    other.close()
    assert last is not None
    assert last.poll() is not None
    with pytest.raises(FormatError, match="the server ends"):
        other("{{ 1 }}", USER)


def test_it_opens_no_file_and_many_threads_may_ask(child: TemplateChild) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: child("{{ messages[0]['content'] * 9 }}", [{"content": str(n)}]), range(200)))
    assert texts == [str(n) * 9 for n in range(200)]


def test_nothing_is_taken_from_the_folder_it_is_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may be started in a download that has a json.py; nor does the child know the server's key."""
    for name in ("json", "jinja2", "camelid"):
        (tmp_path / f"{name}.py").write_text("open('owned', 'w').close()\nraise SystemExit", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMELID_API_KEY", "secret-of-the-server")
    child = TemplateChild()
    assert child("{{ 1 + 1 }}", USER) == "2"
    assert not (tmp_path / "owned").exists()
    assert child._child is not None
    if sys.platform == "linux":
        assert b"secret" not in Path(f"/proc/{child._child.pid}/environ").read_bytes()
    child.close()


def test_the_end_does_not_wait_for_a_template_that_hangs() -> None:
    child = TemplateChild(seconds=60)
    with ThreadPoolExecutor(2) as pool:
        hanging = [pool.submit(child, FOREVER, USER) for _ in range(2)]
        time.sleep(0.5)
        began = time.monotonic()
        child.close()
        for one in hanging:
            with pytest.raises(FormatError, match="the server ends"):
                one.result(timeout=10)
        assert time.monotonic() - began < 10  # of 120
