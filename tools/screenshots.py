"""Take the pictures of the documentation: `screenshots.py MODEL [CHROMIUM]` serves a model and writes docs/images/
(needs playwright). To be run again whenever the page changes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
QUESTION = "Write three short tips for learning Python as a list."


def main(model: str, browser: str | None) -> None:
    from playwright.sync_api import sync_playwright

    words = [sys.executable, "-m", "camelid", "serve", model, "--port", "0", "--quiet", "--quantization", "int8"]
    served = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert served.stderr is not None
        found = re.search(r"http://\S+:\d+", served.stderr.readline())
        assert found is not None
        with sync_playwright() as play:
            chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1100, "height": 640}, locale="en-US")
            page.goto(found[0])
            page.wait_for_selector("#model option", state="attached")
            page.fill("#say", QUESTION)
            page.press("#say", "Enter")
            page.wait_for_selector("#stop:not([hidden])")
            page.wait_for_selector("#send:not([hidden])", timeout=120_000)
            page.click("#glass")
            page.locator(".tokens .token:not(.sure-4)").nth(3).click()
            page.wait_for_selector("#choices:not([hidden])")
            IMAGES.mkdir(exist_ok=True)
            page.screenshot(path=IMAGES / "glass-box.png")
            chromium.close()
    finally:
        served.terminate()
        served.wait(30)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
