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
    stored = page.evaluate("JSON.parse(localStorage.getItem('camelid.conversations'))")
    assert page.locator("#heard").text_content() == stored[0]["messages"][1]["sides"][0]["text"] != ""
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


def test_markdown_that_models_write(browser: Any, running: Running) -> None:
    page = opened(browser.new_context(), running)
    shown = """async (text) => {
        const { blocks } = await import("/page/marks.js");
        const box = document.createElement("div"), begun = performance.now();
        box.append(...blocks(text, "copy"));
        const code = box.querySelector("pre code")?.textContent ?? "";
        return [code, box.querySelectorAll("table").length, performance.now() - begun];
    }"""
    code, _, _ = page.evaluate(shown, "1. Run this:\n   ```python\n   for x in y:\n       print(x)\n   ```\n2. Done")
    assert "for x in y:\n" in code
    assert page.evaluate(shown, "a | b\n--- | ---\n1 | 2")[1] == 1
    assert page.evaluate(shown, "a | b\nno | table")[1] == 0
    _, tables, took = page.evaluate(shown, "a | b\n" + " " * 4000 + "|" * 4000 + "x")
    assert tables == 0
    assert took < 1000  # it took a minute
    assert page.faults == []


def test_values_between_two_steps_are_kept(browser: Any, running: Running) -> None:
    page = opened(browser.new_context(), running)
    for name, value, wanted in (("temperature", "0.75", "0.75"), ("max_tokens", "1.5", "512"), ("top_p", "2", "0.95")):
        kept = page.evaluate(
            """([name, value]) => {
                const label = [...document.querySelectorAll("fieldset input[type=number]")];
                const names = Object.keys(JSON.parse(localStorage.getItem("camelid.settings")).sides[0]);
                const input = label[["temperature", "top_p", "min_p", "max_tokens", "seed"].indexOf(name)];
                input.value = value; input.dispatchEvent(new Event("change"));
                return [String(input.value), names.length];
            }""",
            [name, value],
        )
        assert kept[0] == wanted, name


def test_a_full_storage_loses_alternatives_before_conversations(browser: Any, running: Running) -> None:
    context = browser.new_context()
    page = opened(context, running)
    page.evaluate(
        """() => {
            const tokens = [{ text: "x".repeat(150_000) }];
            const old = (n) => ({ id: `old ${n}`, messages: [{ role: "user", content: `question ${n}` },
                { role: "assistant", sides: [{ text: "answer", tokens }] }] });
            let kept = [];
            try {
                for (let n = 0; n < 60; n++) {
                    kept = [...kept, old(n)];
                    localStorage.setItem("camelid.conversations", JSON.stringify(kept));
                }
            } catch { kept.pop(); }
            let filler = "";
            for (let size = 1 << 17; size > 64; size /= 2) {
                try {
                    localStorage.setItem("filler", filler + "x".repeat(size));
                    filler += "x".repeat(size);
                } catch { /* less, then */ }
            }
        }"""
    )
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    before = page.evaluate("JSON.parse(localStorage.getItem('camelid.conversations')).length")
    page.click("#fresh")
    for n in range(3):
        say(page, f"The meaning {n}")
    stored = page.evaluate("JSON.parse(localStorage.getItem('camelid.conversations'))")
    assert len(stored) == before + 1
    assert [one for one in stored if one["messages"][0]["content"] == f"question {before - 1}"]
    assert page.faults == []


def test_another_answer_to_an_early_question_loses_no_turn(browser: Any, running: Running) -> None:
    page = opened(browser.new_context(), running)
    for text in ("one", "two"):
        say(page, text)
    page.locator(".message:not(.user)").first.get_by_role("button").first.click()
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)
    page.wait_for_function("() => document.querySelectorAll('.message').length === 2")
    stored = page.evaluate("JSON.parse(localStorage.getItem('camelid.conversations'))")
    assert [len(one["messages"]) for one in stored] == [2, 4]
    assert page.faults == []


def test_what_is_being_changed_stays_when_the_page_is_drawn_anew(browser: Any, running: Running) -> None:
    page = opened(browser.new_context(), running)
    say(page, "first words")
    page.locator(".message.user").first.get_by_role("button").first.click()
    page.fill(".message.user textarea", "other words")
    page.click("#glass")
    assert page.locator(".message.user textarea").input_value() == "other words"
    page.locator(".message.user .text").get_by_role("button").first.click()
    page.wait_for_function("() => document.querySelector('.message.user .text').textContent === 'other words'")
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)
    stored = page.evaluate("JSON.parse(localStorage.getItem('camelid.conversations'))")
    assert [[m.get("content") for m in one["messages"]][:1] for one in stored] == [["other words"]]
    assert page.faults == []
