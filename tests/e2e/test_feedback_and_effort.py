"""Feedback on replies of every endpoint, streamed or not, and reasoning effort on each."""

import json

import httpx
import pytest

from tests.e2e.conftest import Running, free_port, rtap_command, running

QUESTION = "make 82 from 3, 7, 25"
CHAT = {"messages": [{"role": "user", "content": QUESTION}]}
MODEL = {"model": "rtap"}
ENDPOINTS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": QUESTION, "max_tokens": 200},
    "/v1/responses": {"input": QUESTION},
    "/v1/messages": CHAT | {"max_tokens": 300},
}


def _post(server: Running, path: str, body) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def _ids(text: str) -> set[str]:
    """Reply ids in the events of a stream."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return {e.get("id") or e.get("response", e.get("message", {})).get("id") for e in events} - {None}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_feedback_on_any_reply_is_accepted_by_its_id(server, path, stream):
    reply = _post(server, path, MODEL | ENDPOINTS[path] | {"stream": stream})
    assert reply.status_code == 200, reply.text
    (request_id,) = _ids(reply.text) if stream else {reply.json()["id"]}
    before = server.metrics()
    verdict = _post(server, "/v1/rtap/feedback", {"request_id": request_id, "correct": True})
    assert verdict.status_code == 200, verdict.text
    got, after = verdict.json(), server.metrics()
    if not stream:
        assert got["confidence"] == reply.json()["rtap"]["confidence"]
    assert after["rtap_feedback_total{correct=true}"] == before.get("rtap_feedback_total{correct=true}", 0) + 1
    assert after["rtap_calibration_verdicts"] == got["verdicts"] == before["rtap_calibration_verdicts"] + 1
    assert after["rtap_calibration_brier"] == pytest.approx(got["brier"], abs=1e-5)
    assert after["rtap_calibration_ece"] == pytest.approx(got["ece"], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"request_id": "chatcmpl-nobody", "correct": True}, 404),
        ({"request_id": "x"}, 400),
        ({"request_id": "x", "correct": "yes"}, 400),
        ({"request_id": "x", "correct": True, "comment": "nice"}, 400),
    ],
)
def test_invalid_feedback_is_refused(server, body, status):
    reply = _post(server, "/v1/rtap/feedback", body)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", {"reasoning_effort": "none"}),
        ("/v1/responses", {"reasoning": {"effort": "minimal"}}),
        ("/v1/messages", {"thinking": {"type": "disabled"}}),
    ],
)
def test_no_effort_is_one_cycle(server, path, field):
    never = {"rtap": {"threshold": 1.0}}  # no confidence reaches 1.0
    reply = _post(server, path, MODEL | ENDPOINTS[path] | field | never)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["rtap"]["cycles"]) == 1


def test_low_effort_is_a_quarter_of_the_cycles_and_rtap_fields_take_precedence(server):
    never = {"rtap": {"threshold": 1.0}}
    low = _post(server, "/v1/chat/completions", MODEL | CHAT | never | {"reasoning_effort": "low"}).json()
    assert (len(low["rtap"]["cycles"]), low["rtap"]["stop_reason"]) == (2, "max_cycles")
    own = {"rtap": {"threshold": 1.0, "max_cycles": 3}}
    won = _post(server, "/v1/chat/completions", MODEL | CHAT | own | {"reasoning_effort": "low"}).json()
    assert len(won["rtap"]["cycles"]) == 3


def test_an_unknown_effort_is_refused(server):
    assert _post(server, "/v1/chat/completions", MODEL | CHAT | {"reasoning_effort": "enormous"}).status_code == 400


@pytest.mark.slow
def test_yesno_confidence_comes_from_the_policy(tmp_path):
    """The bundled policy never learnt to say yes or no: only the mechanism is tested."""
    port = free_port()
    with running(rtap_command(port, "--confidence", "yesno"), port, "/ready", tmp_path) as started:
        assert httpx.get(f"{started.url}/v1/rtap/config").json()["confidence"]["kind"] == "yesno"
        reply = _post(started, "/v1/chat/completions", MODEL | CHAT | {"rtap": {"threshold": 1.0, "max_cycles": 2}})
        rtap = reply.json()["rtap"]
        assert all(0.0 < c["confidence"] < 1.0 for c in rtap["cycles"])
        assert "degraded" not in rtap
        written = reply.json()["usage"]["completion_tokens"]
        assert rtap["confidence_tokens"] > written  # each score reads all cycles before it
        given = {"question": QUESTION, "think": "25*3=75 75+7=82", "answer": "25*3+7"}
        score = _post(started, "/v1/rtap/score", given).json()
        assert 0.0 < score["confidence"] < 1.0
        again = _post(started, "/v1/rtap/score", given).json()
        assert again["confidence"] == pytest.approx(score["confidence"], abs=1e-3)
