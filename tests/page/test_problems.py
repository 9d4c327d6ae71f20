"""Error messages of the page: refusals, broken streams, keys, and a server that is not ready."""

import pytest
from playwright.sync_api import Page, expect

from tests.page.scripted_server import MENDED, refusal, stream_of
from tests.page.test_flows import ask, three_ways

pytestmark = pytest.mark.slow


def problem(page: Page) -> tuple[str, str]:
    """(title, message) of the one that is shown."""
    box = page.get_by_role("alert")
    return box.locator("h3").inner_text(), box.locator("p").first.inner_text()


REFUSALS = [
    (400, "invalid_request_error", {}, "The server refused this request"),
    (413, "invalid_request_error", {}, "The question is too long"),
    (429, "rate_limit_error", {"Retry-After": "30"}, "This key’s limit is reached"),
    (500, "internal_error", {}, "The server failed"),
    (503, "overloaded_error", {"Retry-After": "2"}, "The server is full"),
    (503, "confidence_unavailable", {}, "The server is not ready"),
    (418, "teapot", {}, "The server answered 418"),
]


def test_each_refusal_in_words_with_its_request_id(visit, server):
    page = visit()
    for status, type_, headers, title in REFUSALS:
        server.answers = lambda _, reply=(status, type_, headers): refusal(reply[0], "too much", reply[1], **reply[2])
        ask(page, "failed")
        expect(page.get_by_role("alert").locator("h3")).to_have_text(title)
        assert problem(page) == (title, "too much")
        box = page.get_by_role("alert").inner_text()
        assert f"HTTP {status} · Request id {server.headers[-1]['x-request-id']}" in box
        wait = headers.get("Retry-After")
        assert (f"The server asks to wait {wait} seconds." in box) == (wait is not None)
        assert ("asks to wait" in box) == (wait is not None)
    server.answers = lambda _: stream_of(MENDED)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answer-text")).to_have_text("25*3+7")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_the_servers_own_request_id_wins(visit, server):
    server.answers = lambda _: refusal(400, "no", "x", **{"X-Request-Id": "req-of-the-server"})
    page = visit()
    ask(page, "failed")
    expect(page.locator(".request-id code")).to_have_text("req-of-the-server")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ([b'data: {"error": {"message": "EngineCore died"}}\n\n'], "EngineCore died"),
        ([b'data: {"choices": [{"delta": \n\n'], "The server sent an invalid event."),
        ([], "The server closed the connection before the answer was complete."),
        ([b"data: null\n\n", b"data: 7\n\n"], "The server closed the connection before the answer was complete."),
    ],
    ids=["error event", "no JSON", "end", "no objects"],
)
def test_a_stream_that_breaks_off_keeps_what_was_written(visit, server, rest, message):
    server.answers = lambda _: [*stream_of(MENDED)[:8], *rest]
    page = visit()
    ask(page, "failed")
    assert problem(page) == ("The answer was interrupted", message)
    expect(page.locator(".held:visible")).to_have_text(["(25+7)*3"])
    expect(page.locator(".answer .caption")).to_have_text("Best answer so far")


def test_in_a_comparison_one_may_fail_alone(visit, server):
    def answers(body):
        return refusal(503, "full", "overloaded_error") if body["rtap"].get("policy") == "vote" else three_ways(body)

    server.answers = answers
    page = visit()
    page.get_by_text("Side by side").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".run")).to_have_count(3)
    phases = [run.get_attribute("data-phase") for run in page.locator(".run").all()]
    expect(page.locator(".run[data-phase=done]")).to_have_count(2)
    expect(page.locator(".run").nth(2).get_by_role("alert")).to_contain_text("The server is full")
    assert len(phases) == 3


def test_a_key_is_asked_for_kept_for_the_tab_alone_and_sent(visit, server):
    server.key = "sesame-key"
    page = visit()
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog.get_by_label("Key")).to_be_focused()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_disabled()
    dialog.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("This API key is not valid here")
    dialog.get_by_label("Key").fill("sesame-key")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    ask(page)
    assert server.headers[0]["authorization"] == "Bearer sesame-key"
    page.get_by_text("This request as code").click()
    for language in ("curl", "Python", "TypeScript"):
        page.get_by_text(language, exact=True).click()
        expect(page.locator("#snippet")).to_contain_text("RTAP_API_KEY")
        assert "sesame" not in page.locator("#snippet").inner_text()
    kept = page.evaluate("[sessionStorage, localStorage, document.cookie, location.href].map(JSON.stringify)")
    assert ["sesame-key" in each for each in kept] == [True, False, False, False]
    page.reload()
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    page.get_by_role("button", name="API key").click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator("#state")).to_have_text("An API key is required")
    assert page.evaluate("sessionStorage.length") == 0
    assert "sesame" not in page.content()


def test_a_server_that_is_not_ready_is_waited_for(visit, server):
    server.readiness = (503, "not ready")
    page = visit()
    expect(page.locator("#state")).to_have_text("Not ready: loading or shutting down. Retrying…")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_disabled()
    server.readiness = (200, "ready")
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    ask(page)


def test_a_server_that_begins_to_drain_says_so_at_the_first_refusal(visit, server):
    page = visit()
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    server.readiness = (503, "draining")
    message = "the server is shutting down and accepts no new requests; retry on another server"
    server.answers = lambda _: refusal(503, message, "overloaded_error", **{"Retry-After": "5"})
    ask(page, "failed")
    assert problem(page)[0] == "The server is shutting down"
    expect(page.locator("#state")).to_have_text("Shutting down: finishing running requests")


def test_a_server_that_is_gone_is_told_and_found_again(visit, server):
    page = visit()
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    page.context.set_offline(True)
    ask(page, "failed")
    assert problem(page)[0] == "The server cannot be reached"
    expect(page.locator("#state")).to_contain_text("Not reachable")
    page.context.set_offline(False)
    expect(page.locator("#state")).to_have_text("Ready · rtap")
