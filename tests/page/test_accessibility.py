"""Accessibility: axe in every state and theme, reduced motion, narrow screens, screen readers."""

import pytest
from playwright.sync_api import expect

from tests.page.browser import violations
from tests.page.scripted_server import MENDED, chunk, refusal, stream_of
from tests.page.test_flows import ask, three_ways

pytestmark = pytest.mark.slow
THEMES = ("light", "dark")


@pytest.mark.parametrize("scheme", THEMES)
def test_axe_finds_nothing(visit, server, scheme):
    """Before, during and after a run; with a vote, a comparison, a problem, code and the key."""
    server.answers = lambda _: [*stream_of(MENDED)[:8], chunk({"reasoning": "That was wro"}), 60.0]
    page = visit(color_scheme=scheme)
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    page.get_by_text("More", exact=True).click()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".cycle")).to_have_count(2)
    assert violations(page) == []
    page.get_by_role("button", name="Stop").click()
    server.answers = three_ways
    ask(page)
    for summary in page.locator("summary").all():
        if not summary.evaluate("s => s.parentElement.open"):
            summary.click()
    assert violations(page) == []
    page.get_by_text("Side by side").click()
    ask(page)
    expect(page.locator(".run[data-phase=done]")).to_have_count(3)
    page.get_by_text("The samples").click()
    assert violations(page) == []
    server.answers = lambda _: refusal(503, "full", "overloaded_error", **{"Retry-After": "1"})
    page.get_by_text("One run").click()
    ask(page, "failed")
    page.get_by_role("button", name="API key").click()
    assert violations(page) == []


@pytest.mark.parametrize("width", [320, 390, 700, 1000])
def test_it_fits_any_width(visit, server, width):
    server.answers = three_ways
    page = visit(width=width, height=800, has_touch=width < 700)
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    if not page.get_by_text("More", exact=True).is_visible():
        page.get_by_text("Settings", exact=True).click()
    page.get_by_text("More", exact=True).click()
    for mode in ("One run", "Side by side"):
        page.get_by_text(mode).click()
        ask(page)
        expect(page.locator(".run[data-phase=done]").last).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = "all => all.filter(b => b.offsetParent && b.getBoundingClientRect().height < 24).map(b => b.outerHTML)"
    assert page.locator("button, select, summary, input[type=number]").evaluate_all(small) == []
    if width == 320:
        assert violations(page) == []


def test_motion_only_for_those_who_want_it(visit, server):
    server.answers = lambda _: [chunk({"reasoning": "25+7"}), 60.0]
    for wish, moves in (("no-preference", True), ("reduce", False)):
        page = visit(reduced_motion=wish)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".cycle")).to_be_visible()
        assert page.evaluate("document.getAnimations().length > 0") == moves
        page.get_by_role("button", name="Stop").click()


def test_the_theme_can_be_chosen_and_is_remembered(visit, server):
    page = visit(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Theme: auto").click()
    page.get_by_role("button", name="Theme: light").click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert page.evaluate(ground) == dark


def test_a_screen_reader_hears_cycles_and_not_tokens(visit, server):
    """The announcer changes once for the request, once a cycle, once for the answer."""
    server.answers = lambda _: stream_of(MENDED, pause_seconds=0.02)
    page = visit()
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    page.evaluate(
        """() => { const box = document.getElementById('announcer'); window.heard = [];
        new MutationObserver(() => heard.push(box.textContent)).observe(box, {childList: true}); }"""
    )
    ask(page)
    assert page.evaluate("heard") == [
        "Asked.",
        "Cycle 1: (25+7)*3, confidence 0.00.",
        "Cycle 2: 25*3+7, confidence 0.92.",
        "Answer: 25*3+7. Confidence 0.92 reached the threshold 0.76 after 2 of at most 8 cycles.",
    ]
    live = page.locator("[aria-live], [role=status], [role=alert]")
    assert live.evaluate_all("all => all.filter(e => e.closest('.cycles')).length") == 0
