"""The page in a real browser: run by hand, where Playwright and a Chromium are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Running

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(context: Any, running: Running) -> Any:
    page = context.new_page()
    side = '{"temperature": 0.7, "top_p": 0.95, "min_p": 0.05, "max_tokens": 30, "seed": ""}'
    kept = f'{{"system": "", "sides": [{side}, {side}]}}'  # short, for the context is small
    page.add_init_script(f"localStorage.setItem('camelid.settings', JSON.stringify({kept}))")
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
    page.goto(running.base)
    page.wait_for_selector("#model option", state="attached")
    return page


def say(page: Any, text: str) -> None:
    page.fill("#say", text)
    page.press("#say", "Enter")
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)
    page.wait_for_function("() => document.querySelector('#state').textContent.length > 0")


def test_an_answer_its_tokens_and_another_way_on(browser: Any, running: Running) -> None:
    page = opened(browser.new_context(), running)
    say(page, "The meaning of life")
    page.click("#glass")
    token = page.locator(".tokens .token").nth(2)
    kept = [page.locator(".tokens .token").nth(n).inner_text() for n in range(2)]
    token.click()
    page.wait_for_selector("#choices:not([hidden])")
    page.locator("#choices li button:not([disabled])").first.click()
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)
    assert [page.locator(".tokens .token").nth(n).inner_text() for n in range(2)] == kept
    assert page.faults == []


def test_two_tabs_keep_both_conversations(browser: Any, running: Running) -> None:
    context = browser.new_context()
    first, second = opened(context, running), opened(context, running)
    say(first, "a question of the first tab")
    say(second, "a question of the second tab")
    say(first, "and one more")
    stored = first.evaluate("JSON.parse(localStorage.getItem('camelid.conversations'))")
    assert [len(one["messages"]) for one in stored] == [4, 2]
    second.wait_for_function("() => document.body.innerText.includes('first tab')", timeout=5_000)
    third = opened(context, running)  # the newest conversation, which the first tab shows too
    say(third, "from the third tab")
    first.wait_for_function("() => document.body.innerText.includes('from the third tab')", timeout=5_000)
    say(first, "and from the first again")
    stored = first.evaluate("JSON.parse(localStorage.getItem('camelid.conversations'))")
    assert [len(one["messages"]) for one in stored] == [8, 2]
    assert first.faults + second.faults + third.faults == []


def test_the_phone_and_chinese(browser: Any, running: Running) -> None:
    page = opened(browser.new_context(viewport={"width": 390, "height": 800}, locale="zh-CN"), running)
    say(page, "生命的意义")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("html").get_attribute("lang").startswith("zh")
    assert page.faults == []
