"""Take the pictures of docs/page.md from a running server, in Debian's Chromium. From a checkout with dev installed:

    rtap serve &
    python scripts/page_shots.py --url http://127.0.0.1:8000 --output docs/page

It asks the server for real runs with a fixed seed, and changes nothing there.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

Scheme = Literal["light", "dark"]
SINGLE_RUNS: list[tuple[str, Scheme, int]] = [("light", "light", 1100), ("dark", "dark", 1100), ("phone", "light", 390)]
ANSWER_MS = 60_000
COLOURS = 96  # of a picture: flat surfaces and text need no more, and the file is a third


def main() -> int:
    """Write one PNG a state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("docs/page"), help="folder for the PNGs [%(default)s]")
    parser.add_argument("--seed", default="9", help="of the runs [%(default)s]")
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        print("page_shots: chromium is missing: apt-get install chromium", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, scheme, width in SINGLE_RUNS:
            page = _open(browser, args.url, args.seed, scheme, width)
            _ask(page)
            page.locator(".thinking summary").last.click()
            _save(page, args.output / f"{name}.png")
        page = _open(browser, args.url, args.seed, "light", 1100)
        page.get_by_text("Side by side").click()
        _ask(page, runs=3)
        _save(page, args.output / "side-by-side.png")
        page = _open(browser, args.url, args.seed, "light", 1100)
        page.get_by_label("Tokens at most").fill("100000000")
        _ask(page, phase="failed")
        page.get_by_text("More", exact=True).click()
        _save(page, args.output / "error.png")
        browser.close()
    return 0


def _open(browser: Browser, url: str, seed: str, scheme: Scheme, width: int) -> Page:
    """The page, ready, with the seed in its settings."""
    page = browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce", device_scale_factor=1
    )
    page.goto(url)
    expect(page.locator("#state")).to_contain_text("Ready")
    is_folded = not page.get_by_text("More", exact=True).is_visible()
    if is_folded:
        page.get_by_text("Settings", exact=True).click()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Seed").fill(seed)
    if width < 1000:
        page.get_by_text("Settings", exact=True).click()
    return page


def _ask(page: Page, *, runs: int = 1, phase: str = "done") -> None:
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(f".run[data-phase={phase}]")).to_have_count(runs, timeout=ANSWER_MS)
    more = page.locator("details.more")
    if more.is_visible() and phase == "done":
        more.locator("summary").click()
    page.mouse.move(0, 0)


def _save(page: Page, path: Path) -> None:
    """The whole page as a PNG of few colours."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
