"""Debian's Chromium under Playwright, for tests of the page: a browser, pages that report what went wrong, and axe."""

import contextlib
import shutil
from collections.abc import Generator
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = [
    "--no-sandbox",  # CI is root, where Chromium has no sandbox
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextlib.contextmanager
def chromium() -> Generator[Browser]:
    """A headless browser. No longer than a module's tests: Playwright's event loop would stop asynchronous ones."""
    path = shutil.which("chromium")
    assert path, "Chromium is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(
    browser: Browser, url: str, *, width: int = 1200, height: int = 900, faults_are_meant: bool = False, **context: Any
) -> Generator[Page]:
    """The page, ready to be asked. Errors of its scripts and breaches of its policy fail the test."""
    options: dict[str, Any] = {"reduced_motion": "reduce", **context}
    opened = browser.new_context(viewport={"width": width, "height": height}, **options)
    try:
        page = opened.new_page()
        page.set_default_timeout(10_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if is_fault(message) else None)
        page.goto(url)
        yield page
        assert faults_are_meant or not faults
    finally:
        opened.close()


def is_fault(message: Any) -> bool:
    """Whether a console message is one; that a refusal is a refusal is said there too."""
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


def violations(page: Page) -> list[str]:
    """What axe finds, all rules but the experimental ones: rule and the elements."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {[node['html'][:120] for node in each['nodes']]}" for each in found]
