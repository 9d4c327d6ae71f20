"""Chat completions through the official SDK: cycles, answers, usage, streams, choices, seeds, budgets."""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import Running
from tests.e2e.questions import questions

EAGER = {"threshold": 1.0, "max_cycles": 3}  # no confidence reaches 1.0, so three cycles are written


def _ask(server: Running, question: str = "make 82 from 3, 7, 25", *, rtap=None, **options):
    return server.client.chat.completions.create(
        model="rtap",
        messages=[{"role": "user", "content": question}],
        extra_body=None if rtap is None else {"rtap": rtap},
        **options,
    )


def _stream(server: Running, **options):
    return list(_ask(server, stream=True, stream_options={"include_usage": True}, **options))


def test_an_answer_with_its_trajectory(server):
    reply = _ask(server, "What is 12 * 9?", temperature=0)
    rtap, message = reply.rtap, reply.choices[0].message
    assert rtap["policy"] == "confidence"
    assert message.content == next(c["answer"] for c in rtap["cycles"] if c["accepted"])
    assert message.reasoning == message.reasoning_content
    assert reply.choices[0].finish_reason == "stop"
    assert rtap["confidence"] == next(c["confidence"] for c in rtap["cycles"] if c["accepted"])
    assert reply.usage.completion_tokens == sum(c["tokens"] for c in rtap["cycles"])
    assert 0 < reply.usage.completion_tokens_details.reasoning_tokens < reply.usage.completion_tokens
    assert rtap["confidence_tokens"] > 0
    assert rtap["first_answer_seconds"] > 0


def test_confidence_stops_at_the_threshold(server):
    first, never = (_ask(server, rtap={"threshold": t, "max_cycles": 3}, seed=7).rtap for t in (0.0, 1.0))
    assert (first["stop_reason"], len(first["cycles"])) == ("threshold", 1)
    assert (never["stop_reason"], len(never["cycles"])) == ("max_cycles", 3)
    assert first["cycles"][0]["answer"] == never["cycles"][0]["answer"]


def test_rejected_cycles_are_reasoning_and_the_best_is_content(server):
    reply = _ask(server, rtap=EAGER | {"return_cycles": True}, seed=7)
    rtap, message = reply.rtap, reply.choices[0].message
    assert (rtap["stop_reason"], len(rtap["cycles"])) == ("max_cycles", 3)
    complete = [c for c in rtap["cycles"] if c["answer"] is not None]
    best = max(complete, key=lambda c: (c["confidence"], c["index"]))
    assert message.content == best["answer"]
    assert [c["index"] for c in rtap["cycles"] if c["accepted"]] == [best["index"]]
    for cycle in rtap["cycles"]:
        assert cycle["think"] in message.reasoning
        if not cycle["accepted"] and cycle["answer"] is not None:
            assert f"<answer>{cycle['answer']}</answer>" in message.reasoning


def test_a_stream_has_the_same_content_as_the_whole_reply(server):
    for seed in range(2):
        whole, chunks = _ask(server, rtap=EAGER, seed=seed), _stream(server, rtap=EAGER, seed=seed)
        deltas = [c.choices[0].delta for c in chunks if c.choices]
        content = "".join(d.content or "" for d in deltas)
        reasoning = "".join(getattr(d, "reasoning", None) or "" for d in deltas)
        assert content == whole.choices[0].message.content
        assert reasoning == whole.choices[0].message.reasoning
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        stable = [
            [(c["answer"], round(c["confidence"] or 0, 4), c["tokens"], c["accepted"]) for c in r["cycles"]]
            for r in (whole.rtap, chunks[-1].rtap)
        ]
        assert stable[0] == stable[1]


def test_cycle_events_come_as_cycles_end_and_before_any_content(server):
    chunks = _stream(server, rtap=EAGER, seed=3)
    kinds = []
    for chunk in chunks:
        event = getattr(chunk, "rtap", None)
        if event and event.get("event") == "cycle":
            assert chunk.choices[0].delta.content is None
            kinds.append(event["cycle"]["index"])
        elif chunk.choices and chunk.choices[0].delta.content:
            kinds.append("content")
    assert [kind for kind, _ in itertools.groupby(kinds)] == [0, 1, 2, "content"]
    assert "event" not in chunks[-1].rtap


@pytest.mark.parametrize("rtap", [EAGER, {"policy": "vote", "samples": 3, "threshold": 1.0}])
def test_drafts_show_answers_before_they_are_judged(server, rtap):
    """The chunks of content and of reasoning are the same as without them."""

    def texts(chunks: list, name: str) -> str:
        return "".join(getattr(c.choices[0].delta, name, None) or "" for c in chunks if c.choices)

    chunks, plain = (_stream(server, rtap=rtap | more, seed=3) for more in ({"drafts": True}, {}))
    updates = [(n, chunk.rtap) for n, chunk in enumerate(chunks) if getattr(chunk, "rtap", {}).get("event")]
    drafts = [(n, update["draft"]) for n, update in updates if update["event"] == "draft"]
    ended = {update["cycle"]["index"]: n for n, update in updates if update["event"] == "cycle"}
    assert all(n < ended[draft["index"]] for n, draft in drafts)
    assert all(chunks[n].choices[0].delta.content is None for n, _ in drafts)
    first = chunks[-1].rtap["cycles"][drafts[0][1]["index"]]
    assert "".join(draft.get("text", "") for _, draft in drafts if draft["index"] == first["index"]) == first["answer"]
    assert texts(chunks, "content") == texts(plain, "content")
    if "max_cycles" in rtap:
        assert texts(chunks, "reasoning") == texts(plain, "reasoning")
        assert len(drafts) > 5
    assert chunks[-1].usage.completion_tokens == plain[-1].usage.completion_tokens


def test_thinking_streams_token_by_token(server):
    def num_thoughts() -> int:
        chunks = _stream(server, rtap={"policy": "single"}, temperature=0)
        return sum(bool(c.choices and getattr(c.choices[0].delta, "reasoning", None)) for c in chunks)

    assert max(num_thoughts() for _ in range(3)) > 5  # vLLM joins tokens for a reader that a busy machine delays


def test_the_same_seed_gives_the_same_trajectory_and_another_seed_another(server):
    def answers(seed):
        return [c["answer"] for c in _ask(server, rtap=EAGER, seed=seed).rtap["cycles"]]

    assert answers(11) == answers(11)
    assert len({tuple(answers(seed)) for seed in range(20, 24)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_are_independent_trajectories(server, stream):
    if stream:
        chunks = _stream(server, rtap=EAGER, n=2, seed=5)
        content = {0: "", 1: ""}
        for chunk in chunks:
            for choice in chunk.choices:
                content[choice.index] += choice.delta.content or ""
        objects, usage = chunks[-1].rtap_choices, chunks[-1].usage
    else:
        reply = _ask(server, rtap=EAGER, n=2, seed=5)
        content = {c.index: c.message.content for c in reply.choices}
        objects, usage = [c.rtap for c in reply.choices], reply.usage
    for index, rtap in enumerate(objects):
        assert content[index] == next(c["answer"] for c in rtap["cycles"] if c["accepted"])
    assert usage.completion_tokens == sum(c["tokens"] for rtap in objects for c in rtap["cycles"])


def test_max_tokens_is_one_budget_and_finish_reason_says_so(server):
    reply = _ask(server, rtap=EAGER, seed=1, max_tokens=60)
    assert reply.usage.completion_tokens <= 60
    assert reply.choices[0].finish_reason == ("length" if reply.choices[0].message.content is None else "stop")
    tiny = _ask(server, rtap=EAGER, seed=1, max_tokens=5)
    assert (tiny.rtap["stop_reason"], tiny.choices[0].finish_reason) == ("max_tokens", "length")
    assert tiny.choices[0].message.content is None
    assert tiny.usage.completion_tokens == 5


def test_policies(server):
    single = _ask(server, rtap={"policy": "single"}, seed=1)
    assert (len(single.rtap["cycles"]), single.rtap["stop_reason"]) == (1, "max_cycles")
    assert single.rtap["confidence"] is None
    model = _ask(server, rtap={"policy": "model"}, seed=1)
    assert model.rtap["stop_reason"] in ("model", "max_cycles")
    assert model.choices[0].message.content == model.rtap["cycles"][-1]["answer"]
    vote = _ask(server, rtap={"policy": "vote", "samples": 5, "threshold": 1.0}, seed=1)
    assert (len(vote.rtap["cycles"]), vote.rtap["stop_reason"]) == (5, "samples")
    assert sum(one["votes"] for one in vote.rtap["candidates"]) == sum(
        c["answer"] is not None for c in vote.rtap["cycles"]
    )
    assert vote.choices[0].message.content in [c["answer"] for c in vote.rtap["cycles"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_of_policy_model_is_one_engine_request_with_the_same_cycles(server, stream):
    """A stop string makes it one request a cycle, because the engine holds text back for it. This one never occurs."""

    def ask(question: str, **more) -> tuple[str, list, str, float]:
        before = server.metrics()["vllm:request_success_total"]
        asked = {"rtap": {"policy": "model", "return_cycles": True}, "temperature": 0, **more}
        if stream:
            chunks = _stream(server, question=question, **asked)
            rtap, text = chunks[-1].rtap, "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        else:
            reply = _ask(server, question, **asked)
            rtap, text = reply.rtap, reply.choices[0].message.content
        cycles = [[cycle[k] for k in ("think", "answer", "tokens", "oops_tokens")] for cycle in rtap["cycles"]]
        return text, cycles, rtap["stop_reason"], server.metrics()["vllm:request_success_total"] - before

    counts = set[int]()
    for question in ("12 * 9", "get 200 from 10, 10, 19"):
        once, often = ask(question), ask(question, stop=["never\n"])
        assert once[:3] == often[:3]
        assert once[3] <= 1  # a request that is aborted after its last cycle does not count as success
        assert often[3] >= len(often[1])
        counts.add(len(once[1]))
    assert max(counts) > 1


def test_a_deadline_returns_the_best_so_far(server):
    reply = _ask(server, rtap={"threshold": 1.0, "max_cycles": 16, "deadline_seconds": 2}, seed=2)
    assert reply.rtap["stop_reason"] in ("deadline", "max_cycles")
    assert reply.choices[0].message.content is not None
    assert reply.rtap["first_answer_seconds"] < 3.0


def test_options_may_come_as_xargs_but_only_once(server):
    by_xargs = server.client.chat.completions.create(
        model="rtap",
        messages=[{"role": "user", "content": "12*9"}],
        extra_body={"vllm_xargs": {"rtap_policy": "vote", "rtap_samples": 2}},
    )
    assert (by_xargs.rtap["policy"], len(by_xargs.rtap["cycles"])) == ("vote", 2)
    import openai

    with pytest.raises(openai.BadRequestError, match="give the rtap options once"):
        server.client.chat.completions.create(
            model="rtap",
            messages=[{"role": "user", "content": "12*9"}],
            extra_body={"vllm_xargs": {"rtap_policy": "vote"}, "rtap": {}},
        )


def test_the_cache_makes_later_cycles_cheap(server):
    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda q: _ask(server, q, rtap={"threshold": 1.0, "max_cycles": 5}), questions(10)))
    recomputed = [c["prompt_tokens"] - c["cached_tokens"] for reply in replies for c in reply.rtap["cycles"][1:]]
    # A block is 32 tokens and `<think>` opens a cycle. Only whole blocks are cached, so one block may be recomputed.
    assert max(recomputed) <= 32 + 1
    assert len(recomputed) >= 30


def test_logprobs_are_those_of_the_content(server):
    reply = _ask(server, rtap=EAGER, seed=4, logprobs=True, top_logprobs=2)
    entries = reply.choices[0].logprobs.content
    assert reply.choices[0].message.content in "".join(entry.token for entry in entries)
    assert len(entries) <= reply.usage.completion_tokens - reply.usage.completion_tokens_details.reasoning_tokens


def test_both_reasoning_names_are_accepted_in_history(server):
    for name in ("reasoning", "reasoning_content"):
        reply = server.client.chat.completions.create(
            model="rtap",
            messages=[
                {"role": "user", "content": "12*9"},
                {"role": "assistant", "content": "108", name: "12*9=108"},
                {"role": "user", "content": "What is 3 + 4?"},
            ],
        )
        assert reply.rtap["cycles"]


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{1,4}"}}, r"[0-9]{1,4}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, r"yes|no"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "string", "enum": ["yes", "no"]}},
                }
            },
            r'"(yes|no)"',
        ),
    ],
)
def test_a_grammar_binds_every_answer_and_no_thought(server, field, pattern):
    reply = server.client.chat.completions.create(
        model="rtap", messages=[{"role": "user", "content": "make 82 from 3, 7, 25"}], seed=5, max_tokens=600,
        extra_body=field | {"rtap": EAGER | {"return_cycles": True}},
    )  # fmt: skip
    cycles = reply.rtap["cycles"]
    assert len(cycles) == EAGER["max_cycles"]
    answers = [c["answer"] for c in cycles if c["answer"] is not None]  # the model may end its turn while thinking
    assert answers
    assert all(re.fullmatch(pattern, answer) for answer in answers), cycles
    assert "=" in cycles[0]["think"]
    assert re.fullmatch(pattern, reply.choices[0].message.content)
