"""Text of a model or a server stays text: it runs no script, adds no element and stays in its box."""

import pytest
from playwright.sync_api import Page, expect

from tests.page.browser import open_page
from tests.page.scripted_server import CONFIG, chunk, cycle, draft, refusal, stream_of
from tests.page.test_flows import ask

pytestmark = pytest.mark.slow
MARKUP = (
    '<img src=x onerror="window.pwned=1"><script>window.pwned=2</script></p></article><svg onload=window.pwned=3>'
    "<iframe srcdoc='<script>parent.pwned=4</script>'></iframe><a href=\"javascript:pwned=5\">x</a>"
    "<style>*{display:none}</style><base href='//evil.example/'><form action=/><input autofocus onfocus=pwned=6>"
    "{{constructor.constructor('pwned=7')()}} ${window.pwned=8} <!-- --> ]]> \x00 &lt;b&gt;"
)
BIDI = "\u202ereversed\u202c \u2066isolated \u200f\u061c\u202dover" + "\u0301" * 60 + "\ufeff\ud7ff"
LONG = "W" * 60_000


def is_untouched(page: Page) -> None:
    """Nothing ran, nothing but our own elements is there, nothing sticks out."""
    assert page.evaluate("window.pwned") is None
    assert page.locator("body :is(img, iframe, script, style, base, form form), main a").count() == 0
    assert page.evaluate("document.baseURI") == page.url
    assert page.locator("[onerror], [onload], [onfocus], [href^=javascript]").count() == 0
    width, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room


@pytest.mark.parametrize("width", [1200, 320])
def test_in_thoughts_answers_and_contents(visit, server, width):
    page = visit(width=width)
    for text in (MARKUP, BIDI, LONG, "\n" * 2_000, "__proto__"):
        cycles = [cycle(0, text, text, 0.1), cycle(1, f"again {text}", text + "!", 0.9, accepted=True)]
        server.answers = lambda _, cycles=cycles: stream_of(cycles)
        ask(page)
        assert page.locator(".answer-text").text_content() == text + "!"
        assert page.locator(".thinking pre").first.text_content() == text
        for details in page.locator(".thinking summary").all():
            details.click()
        is_untouched(page)


def test_in_a_thought_that_is_being_written(visit, server):
    written = [draft(0, text=MARKUP), draft(0, text=BIDI)]
    server.answers = lambda _: [chunk({"reasoning": MARKUP}), chunk({"reasoning": BIDI}), *written, 60.0]
    page = visit()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".thinking pre")).to_contain_text("constructor.constructor")
    assert page.locator(".thinking pre").text_content() == MARKUP + BIDI
    expect(page.locator(".answer-text")).to_contain_text("reversed")
    assert page.locator(".answer-text").text_content() == MARKUP + BIDI
    is_untouched(page)
    page.get_by_role("button", name="Stop").click()


def test_in_refusals_and_ids(visit, server):
    server.answers = lambda _: refusal(400, MARKUP, MARKUP, **{"X-Request-Id": "<img src=x onerror=pwned=1>"})
    page = visit(width=320)
    ask(page, "failed")
    expect(page.locator(".request-id code")).to_have_text("<img src=x onerror=pwned=1>")
    is_untouched(page)


def test_in_everything_that_a_server_says_of_itself(visit, server):
    server.config = CONFIG | {
        "models": [MARKUP, 7, None, LONG], "version": MARKUP, "confidence": {"kind": MARKUP},
        "defaults": {"policy": "<img>", "threshold": "1", "max_cycles": -3, "samples": None},
        "limits": {"max_cycles": "many", "samples": 1e400, "deadline_seconds": [MARKUP]},
    }  # fmt: skip
    server.readiness = (200, MARKUP)
    server.config["limits"]["samples"] = None
    page = visit(width=320)
    expect(page.locator("#ceilings")).to_contain_text("<img src=x")
    page.get_by_text("Settings", exact=True).click()
    is_untouched(page)


EVENTS = [
    {"choices": [{"index": 0, "delta": {"reasoning": {"toString": 1}, "content": ["<b>"]}}]},
    {"choices": "<b>", "rtap": "<b>", "usage": "<b>", "id": {}},
    {"choices": [None], "rtap": {"event": MARKUP, "cycle": MARKUP}},
    chunk({}, rtap={"event": "cycle", "cycle": {"index": "__proto__", "answer": MARKUP}}),
    chunk({}, rtap={"event": "cycle", "cycle": {"index": -1, "answer": MARKUP}}),
    chunk({}, rtap={"event": "draft", "draft": MARKUP}),
    chunk({}, rtap={"event": "draft", "draft": {"index": "__proto__", "text": MARKUP}}),
    chunk({}, rtap={"event": "draft", "draft": {"index": 7, "text": {"a": 1}, "think": 7}}),
    chunk({}, rtap={"event": "cycle", "cycle": {"index": 0, "answer": {"a": 1}, "think": 7, "confidence": MARKUP}}),
    chunk({}, rtap={"event": "cycle", "cycle": {"index": 10**9, "answer": "x", "confidence": 1e9, "tokens": "9"}}),
    chunk(None, rtap={"stop_reason": MARKUP, "confidence": MARKUP, "cycles": MARKUP, "degraded": MARKUP}),
]


def test_events_of_the_wrong_shape_are_passed_over(visit, server):
    server.answers = lambda _: [*EVENTS, b"data: [DONE]\n\n"]
    page = visit(width=320)
    ask(page)
    expect(page.locator(".sentence")).to_contain_text("The run ended with “<img src=x")
    assert page.locator(".cycle").count() == 2
    assert page.get_by_role("meter").count() == 0
    is_untouched(page)


def test_the_policy_stops_what_the_page_does_not_do(browser, server):
    """If text ever became markup, the browser would refuse it."""
    with open_page(browser, server.url, faults_are_meant=True) as page:
        for attempt in (
            "document.body.innerHTML = '<b>x</b>'",
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned=1'}))",
            "document.body.setAttribute('onclick', 'window.pwned=2')",
        ):
            assert page.evaluate(f"() => {{ try {{ {attempt} }} catch (e) {{ return e.name }} }}") == "TypeError"
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
