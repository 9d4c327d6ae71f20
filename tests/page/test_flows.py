"""User flows in a real browser over scripted streams: ask, watch, stop, compare, configure, give feedback."""

import time
from dataclasses import replace

import pytest
from playwright.sync_api import Page, expect

from rtap_core.types import Policy, StopReason
from tests.page.scripted_server import CONFIG, MENDED, chunk, cycle, cycle_event, draft, stream_of

pytestmark = pytest.mark.slow
VOTE = [
    cycle(n, "25+7=32 32*3=96" if n % 3 == 0 else "25*3=75 75+7=82", "(25+7)*3" if n % 3 == 0 else "25*3+7",
          0.004 if n % 3 == 0 else 0.994, accepted=n == 1)
    for n in range(8)
]  # fmt: skip
ONE_PASS = [cycle(0, "25+7=32 32*3=96", "(25+7)*3", None, accepted=True)]


def three_ways(body):
    policy = body["rtap"].get("policy", "confidence")
    if policy == "vote":
        return stream_of(VOTE, Policy.VOTE, StopReason.SAMPLES)
    return stream_of(ONE_PASS, Policy.SINGLE, StopReason.MAX_CYCLES) if policy == "single" else stream_of(MENDED)


def ask(page: Page, phase: str = "done") -> None:
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".run").last).to_have_attribute("data-phase", phase)


def figures(page: Page, run: int = 0) -> dict[str, str]:
    entries = page.locator(".run").nth(run).locator(".figures > div").all()
    return {e.locator("dt").inner_text(): e.locator("dd").inner_text().replace("\xa0", " ") for e in entries}


def test_a_run_with_its_cycles_its_reason_and_its_figures(visit, server):
    page = visit()
    ask(page)
    expect(page.locator(".answer-text")).to_have_text("25*3+7")
    reason = "Confidence 0.92 reached the threshold 0.76 after 2 of at most 8 cycles."
    expect(page.locator(".sentence")).to_have_text(reason)
    rows = page.locator(".cycle")
    expect(rows.locator(".cycle-title")).to_have_text(["Cycle 1not accepted", "Cycle 2accepted"])
    expect(rows.locator(".held")).to_have_text(["(25+7)*3", "25*3+7"])
    expect(page.get_by_role("meter", name="Confidence 0.92, threshold 0.76")).to_be_visible()
    fills = rows.locator(".meter i").evaluate_all("all => all.map(i => i.style.inlineSize)")
    lines = rows.locator(".meter b").evaluate_all("all => all.map(b => b.style.insetInlineStart)")
    assert (fills, lines) == (["0.4%", "92.8%"], ["76%", "76%"])
    told = figures(page)
    written = sum(c.tokens for c in MENDED)
    assert told["Tokens generated"] == f"{written}{written - 8} thinking"
    assert told["Time to first answer"] == "330 ms"
    assert told["Time to first token"].endswith(" ms")
    assert told["Confidence"] == "0.00 → 0.92"
    of_all, of_vote = 4 * written, 8 * MENDED[0].tokens
    assert told["Saved against all 8 cycles"] == f"≈ 75 %{of_all - written} tokens, estimate"
    share = round(100 * (of_vote - written) / of_vote)
    assert told["Saved against a vote of 8"] == f"≈ {share} %{of_vote - written} tokens, estimate"
    titles = page.locator(".figures > div").evaluate_all("all => all.map(div => div.title)")
    assert all(titles)
    assert [title.startswith("Estimate: ") for title in titles[-2:]] == [True, True]
    expect(page.locator("#announcer")).to_have_text(f"Answer: 25*3+7. {reason}")
    (body,) = server.asked
    assert body["rtap"] == {"return_cycles": True, "drafts": True}
    assert (body["stream"], body["messages"][0]["content"]) == (True, "make 82 from 3, 7, 25")


def test_an_answer_below_the_threshold_is_amber_and_says_what_it_needs(visit, server):
    best = [replace(MENDED[0], confidence=0.13, accepted=True), replace(MENDED[1], confidence=0.12, accepted=False)]
    server.answers = lambda _: stream_of(best, stop=StopReason.MAX_CYCLES)
    page = visit()
    ask(page)
    expect(page.locator(".answer .caption")).to_have_text("AnswerNot sure (0.13, needs 0.76)")
    expect(page.locator(".cycle .verdict")).to_have_text(["returned: the best answer", "not accepted"])
    accent, amber, number = page.evaluate(
        """() => [".state", ".doubt", ".cycle .number"].map((one, i) =>
        getComputedStyle(document.querySelector(one), i ? null : "::before")[i ? "color" : "backgroundColor"])"""
    )
    assert amber == number != accent
    assert figures(page)["Confidence"] == "0.13 → 0.13"
    dot, line = page.locator(".sparkline circle"), page.locator(".sparkline polyline")
    assert dot.get_attribute("cx") == line.get_attribute("points").split(",")[0]


def test_what_cost_more_is_no_saving(visit, server):
    long = [replace(MENDED[0], tokens=9), replace(MENDED[1], tokens=900)]
    server.answers = lambda _: stream_of(long)
    page = visit()
    ask(page)
    assert [name for name in figures(page) if name.startswith("Saved")] == ["Saved against all 8 cycles"]


def test_thinking_folds_when_it_is_judged_and_unfolds_without_the_repeated_answer(visit, server):
    page = visit()
    ask(page)
    thoughts = page.locator(".thinking")
    assert thoughts.evaluate_all("all => all.map(d => d.open)") == [False, False]
    expect(thoughts.locator("summary")).to_have_text([f"Thought for 170 ms · {c.tokens} tokens" for c in MENDED])
    thoughts.nth(1).locator("summary").click()
    expect(thoughts.nth(1).locator("pre")).to_have_text("That was wrong. 25*3=75 75+7=82")


def test_while_it_runs_the_answer_is_held_and_stop_closes_the_connection(visit, server):
    server.answers = lambda _: [*stream_of(MENDED)[:7], chunk({"reasoning": "That was wro"}), 60.0]
    page = visit()
    page.get_by_role("button", name="Ask", exact=True).click()
    row = page.locator(".cycle").nth(1)
    expect(row.locator("pre")).to_have_text("That was wro")
    expect(row.locator(".verdict")).to_have_text("generating")
    expect(page.locator(".answer .caption")).to_have_text("Best answer so far, not returned yet")
    expect(page.locator(".sentence")).to_have_text("Cycle 2 of at most 8: thinking…")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".sentence")).to_have_text("Stopped after 1 cycle. The best answer so far is shown.")
    expect(row.locator(".verdict")).to_have_text("cut off")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_focused()
    until = time.monotonic() + 5
    while server.left == 0:
        assert time.monotonic() < until, "the server did not see the client leave"
        time.sleep(0.02)
    server.answers = lambda _: stream_of(MENDED)
    ask(page)


def test_the_answer_that_is_being_written_is_grey_until_the_accepted_one_replaces_it(visit, server):
    wrong = "First add: 25+7=32.\nThen 32*3, so \\boxed{96}."
    first, second = (
        cycle(n, "", answer, score, accepted=n == 1) for n, answer, score in ((0, wrong, 0.1), (1, "82", 0.9))
    )
    start = [chunk({"role": "assistant", "content": ""}), draft(0, text=wrong[:9]), draft(0, text=wrong[9:])]
    rejected = [cycle_event(first), chunk({"reasoning": f"\n{wrong}\n"}), draft(1, text="8")]
    server.answers = lambda _: [*start, 1.5, *rejected, 1.5, draft(1, text="2"), *stream_of([first, second])[-4:]]
    page = visit()
    page.get_by_role("button", name="Ask", exact=True).click()
    answer, caption, row = page.locator(".answer-text"), page.locator(".answer .caption"), page.locator(".cycle").last
    expect(answer).to_have_text(wrong)
    expect(answer).to_have_attribute("data-state", "held")
    expect(caption).to_have_text("Answer of cycle 1, not judged yet")
    expect(row.locator(".cycle-title")).to_have_text("Cycle 1writing its answer")
    expect(caption).to_have_text("Answer of cycle 2, not judged yet")
    expect(answer).to_have_text("8")
    expect(page.locator(".sentence")).to_have_text("Cycle 2 of at most 8: answering…")
    expect(row.locator("pre")).not_to_contain_text("First add")
    expect(answer).to_have_attribute("data-state", "final")
    expect(answer).to_have_text("82")


def test_a_vote_shows_the_sample_that_is_being_written(visit, server):
    voted = stream_of(VOTE, Policy.VOTE, StopReason.SAMPLES)
    first = [draft(0, think="25+7=32"), draft(0, think=" 32*3=96"), draft(0, text="(25")]
    ended = [cycle_event(VOTE[2]), 1.5, cycle_event(VOTE[0]), draft(3, text="(25+7)*3"), 1.5]
    server.answers = lambda _: [voted[0], *first, 1.5, *ended, *voted[1:]]
    page = visit()
    page.get_by_role("radio", name="A vote").check()
    page.get_by_role("button", name="Ask", exact=True).click()
    caption = page.locator(".answer .caption")
    expect(caption).to_have_text("Answer of sample 1, not judged yet")
    expect(page.locator(".cycle").last.locator("pre")).to_have_text("25+7=32 32*3=96")
    titles = page.locator(".cycle .cycle-title")
    expect(titles).to_have_text(["Sample 3", "Sample 1writing its answer"])
    expect(caption).to_have_text("Answer of sample 4, not judged yet")
    expect(titles).to_have_text(["Sample 1", "Sample 3", "Sample 4writing its answer"])
    expect(page.locator(".answer-text")).to_have_attribute("data-state", "final")
    assert page.locator(".cycle").count() == 8


def test_the_keyboard_alone_is_enough(visit, server):
    server.answers = lambda _: [*stream_of(MENDED)[:6], 60.0]
    page = visit()
    expect(page.locator("#state")).to_have_text("Ready · rtap")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("make 24 from 1, 2, 3, 4")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".cycle").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".run")).to_have_attribute("data-phase", "stopped")
    assert server.asked[0]["messages"][0]["content"] == "make 24 from 1, 2, 3, 4"
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("(e => e.id || e.name || e.textContent.trim())(document.activeElement)"))
    assert {"go", "threshold", "max_cycles", "key-button", "theme-button", "policy", "mode"} <= seen


def test_settings_keep_to_the_servers_ceilings_and_only_changes_are_sent(visit, server):
    server.config = CONFIG | {
        "limits": {"max_cycles": 5, "samples": 6, "deadline_seconds": 30.0},
        "defaults": CONFIG["defaults"] | {"threshold": 0.7612, "max_cycles": 3, "samples": 4},
    }
    page = visit()
    threshold, cycles = page.get_by_role("slider", name="Threshold"), page.get_by_label("Cycles at most")
    expect(cycles).to_have_attribute("max", "5")
    expect(cycles).to_have_value("3")
    ask(page)
    threshold.press("End")
    cycles.press("End")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Seed").fill("9")
    page.get_by_label("Deadline, seconds").fill("31")
    page.get_by_role("button", name="Ask", exact=True).click()
    assert page.get_by_label("Deadline, seconds").evaluate("input => input.validity.rangeOverflow")
    page.get_by_label("Deadline, seconds").fill("20")
    ask(page)
    page.get_by_role("radio", name="A vote").check()
    expect(page.get_by_label("Samples of a vote")).to_have_attribute("max", "6")
    expect(threshold).to_be_hidden()
    ask(page)
    assert [body["rtap"] for body in server.asked] == [
        {"return_cycles": True, "drafts": True},
        {"threshold": 1, "max_cycles": 5, "deadline_seconds": 20, "return_cycles": True, "drafts": True},
        {"policy": "vote", "deadline_seconds": 20, "return_cycles": True, "drafts": True},
    ]
    assert [body.get("seed") for body in server.asked] == [None, 9, 9]


def test_presets_come_from_the_servers_configuration(visit, server):
    page = visit()
    page.get_by_role("button", name="Careful").click()
    ask(page)
    page.get_by_role("button", name="As in the paper").click()
    ask(page)
    page.get_by_role("button", name="Server’s defaults").click()
    page.get_by_role("button", name="Countdown, harder").click()
    ask(page)
    assert [body["rtap"] for body in server.asked] == [
        {"threshold": 0.88, "max_cycles": 16, "return_cycles": True, "drafts": True},
        {"policy": "model", "return_cycles": True, "drafts": True},
        {"return_cycles": True, "drafts": True},
    ]
    assert server.asked[2]["messages"][0]["content"] == "Make 264 with 24, 14, 25."


def test_a_server_without_a_generator_offers_no_confidence(visit, server):
    server.config = CONFIG | {
        "models": ["qwen", "lora"],
        "confidence": {"kind": "none"},
        "defaults": CONFIG["defaults"] | {"policy": "model"},
    }
    page = visit()
    expect(page.get_by_role("radio", name="Confidence")).to_be_disabled()
    expect(page.get_by_label("The model")).to_be_checked()
    server.answers = lambda _: stream_of(ONE_PASS, Policy.MODEL, StopReason.MODEL)
    ask(page)
    expect(page.locator(".sentence")).to_have_text("The model ended its turn after 1 cycle.")
    assert page.get_by_role("meter").count() == 0
    page.get_by_text("More", exact=True).click()
    page.locator("#model").select_option("lora")
    ask(page)
    assert [body["model"] for body in server.asked] == ["qwen", "lora"]


def test_a_vote_is_told_in_sample_order_with_its_tally(visit, server):
    events = list(stream_of([VOTE[n] for n in (1, 0, 2, 3, 5, 4, 7, 6)], Policy.VOTE, StopReason.SAMPLES))
    events[-2]["rtap"]["cycles"].sort(key=lambda c: c["index"])
    server.answers = lambda _: events
    page = visit()
    page.get_by_role("radio", name="A vote").check()
    ask(page)
    expect(page.locator(".sentence")).to_have_text("The majority of 8 samples, weighted by confidence.")
    expect(page.locator(".tally li")).to_have_text(["25*3+75 votes, weight 4.97", "(25+7)*33 votes, weight 0.01"])
    rows = page.locator(".cycle-title")
    labels = ["Sample 1\ndiffers", "Sample 2\nreturned for the majority", "Sample 3\nagrees"]
    assert rows.all_inner_texts()[:3] == labels


def test_side_by_side(visit, server):
    server.answers = three_ways
    page = visit()
    page.get_by_text("Side by side").click()
    ask(page)
    expect(page.locator(".run[data-phase=done]")).to_have_count(3)
    assert page.locator(".run > h2").all_inner_texts() == ["One pass", "Recursive", "Vote"]
    assert page.locator(".answer-text").all_inner_texts() == ["(25+7)*3", "25*3+7", "25*3+7"]
    assert sorted(body["rtap"].get("policy", "") for body in server.asked) == ["", "single", "vote"]
    spent = [sum(c.tokens for c in run) for run in (ONE_PASS, MENDED, VOTE)]
    saved = spent[2] - spent[1]
    share = round(100 * saved / spent[2])
    assert figures(page, 1)["Saved against the vote of 8"] == f"{share} %{saved} tokens, measured"
    widths = page.locator(".token-bar i").evaluate_all("all => all.map(i => parseFloat(i.style.inlineSize))")
    assert widths == pytest.approx([100 * tokens / spent[2] for tokens in spent], rel=1e-4)
    boxes = [box.bounding_box() for box in page.locator(".run").all()]
    assert len({box["y"] for box in boxes}) == 1
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]


def test_a_verdict_is_told_to_the_server(visit, server):
    page = visit()
    ask(page)
    page.get_by_role("button", name="Yes").click()
    expect(page.locator(".was-right [role=status]")).to_have_text("Noted: 1 verdict so far.")
    assert server.judged == [{"request_id": "chatcmpl-scripted", "correct": True}]


def test_a_degraded_run_says_so(visit, server):
    server.answers = lambda _: stream_of(ONE_PASS, stop=StopReason.MODEL, degraded="timeout")
    page = visit()
    ask(page)
    expect(page.locator(".sentence")).to_contain_text("The confidence generator gave no score (timeout)")
    expect(page.locator(".cycle")).to_have_attribute("data-state", "unsure")  # green is for scores above the threshold


SENTENCES = [
    (StopReason.MODEL, MENDED, "The model ended its turn after 2 cycles."),
    (StopReason.MAX_CYCLES, MENDED, "All 2 cycles were used and none reached the threshold 0.76"),
    (StopReason.MAX_TOKENS, MENDED, "The token limit was reached after 2 cycles; the best answer so far"),
    (StopReason.MAX_TOKENS, [cycle(0, "25", None, None)], "The token limit was reached after 1 cycle; no answer"),
    (StopReason.DEADLINE, MENDED, "The deadline was reached after 2 cycles; the best answer so far"),
    (StopReason.DRAINED, MENDED, "The server is shutting down, so the run ended after 2 cycles; the best answer"),
    (StopReason.NO_GAIN, MENDED, "Confidence stopped rising, so the run ended after 2 cycles"),
    (StopReason.AGREEMENT, VOTE[:4], "agreed well enough; the leading answer is returned."),
]


def test_every_stop_reason_is_a_sentence(visit, server):
    page = visit()
    for stop, cycles, sentence in SENTENCES:
        server.answers = lambda _, stop=stop, cycles=cycles: stream_of(cycles, stop=stop)
        ask(page)
        expect(page.locator(".sentence")).to_contain_text(sentence)
    assert {stop for stop, _, _ in SENTENCES} | {StopReason.THRESHOLD, StopReason.SAMPLES} == set(StopReason)


def test_raw_events_are_what_came(visit, server):
    page = visit()
    ask(page)
    page.get_by_text("Raw events").click()
    expect(page.locator(".raw")).to_contain_text('"stop_reason": "threshold"')
    assert page.locator(".raw").inner_text().count('"event": "cycle"') == len(MENDED)
