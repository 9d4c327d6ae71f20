"""Debian's Chromium under Playwright: a browser, pages that report errors, and axe."""

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
    """A headless browser. Keep it for one module only: Playwright's event loop stops asynchronous tests."""
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
    """The open page. Errors of its scripts and violations of its content security policy fail the test."""
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
    """True for an error or warning in the console, except the browser's note about a refused request."""
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


def violations(page: Page) -> list[str]:
    """Violations of axe's rules, without the experimental ones: rule and elements."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {[node['html'][:120] for node in each['nodes']]}" for each in found]
