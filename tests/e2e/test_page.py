"""The page over the real server: it shows what the API answers, and Stop ends the work of the engine."""

import time

import httpx
import pytest
from playwright.sync_api import expect

from tests.page.browser import chromium, open_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def test_a_run_shows_what_the_api_answers_and_takes_a_verdict(browser, server):
    body = {"model": "rtap", "seed": 9, "messages": [{"role": "user", "content": "make 82 from 3, 7, 25"}]}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    before = server.metrics().get("rtap_feedback_total", 0)
    with open_page(browser, server.url) as page:
        expect(page.locator("#state")).to_have_text("Ready · rtap")
        page.get_by_text("More", exact=True).click()
        page.get_by_label("Seed").fill("9")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".run")).to_have_attribute("data-phase", "done", timeout=60_000)
        expect(page.locator(".answer-text")).to_have_text(reply["choices"][0]["message"]["content"])
        expect(page.locator(".held")).to_have_text([c["answer"] for c in reply["rtap"]["cycles"]])
        assert page.locator(".thinking pre").first.text_content().strip() in reply["choices"][0]["message"]["reasoning"]
        expect(page.locator(".figures dd").first).to_contain_text(str(reply["usage"]["completion_tokens"]))
        page.get_by_role("button", name="No", exact=True).click()
        expect(page.locator(".was-right [role=status]")).to_contain_text("Noted: ")
        page.get_by_text("Side by side").click()
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".run[data-phase=done]")).to_have_count(3, timeout=60_000)
        assert 1 <= page.locator(".cycles").last.locator("li").count() <= 8  # samples until they agree
    assert server.metrics()["rtap_feedback_total"] == before + 1


def test_stop_really_aborts(browser, server):
    def running() -> float:
        found = server.metrics()
        return found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"] + found["rtap_in_flight"]

    before = server.metrics()
    with open_page(browser, server.url) as page:
        expect(page.locator("#state")).to_have_text("Ready · rtap")
        page.get_by_role("slider", name="Threshold").press("End")
        page.get_by_label("Cycles at most").press("End")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".cycle .held").first).to_be_visible(timeout=60_000)
        assert running() > 0
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".run")).to_have_attribute("data-phase", "stopped")
        until = time.monotonic() + 2
        while running() > 0:
            assert time.monotonic() < until, "the engine goes on"
            time.sleep(0.05)
        after = server.metrics()
    name = "rtap_requests_total{policy=confidence,stop_reason=abandoned}"
    assert after[name] == before.get(name, 0) + 1
