"""Confidence from a remote vLLM and from log-probabilities; a remote generator that dies degrades requests."""

import os
import signal

import httpx
import pytest

from tests.e2e.conftest import MODELS, free_port, rtap_command, running, vllm_command

QUESTION = "make 82 from 3, 7, 25"


def _ask(started, **rtap):
    body = {"model": "rtap", "messages": [{"role": "user", "content": QUESTION}], "seed": 3, "rtap": rtap}
    headers = {"x-api-key": started.key}
    reply = httpx.post(f"{started.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.slow
def test_remote_scores_like_the_local_engine_and_its_death_degrades(server, tmp_path):
    generator_port, port = free_port(), free_port()
    command = vllm_command("confidence", generator_port, "--runner", "pooling", "--kv-cache-memory-bytes", str(2**28))
    with running(command, generator_port, "/health", tmp_path) as generator:
        config = str(MODELS / "confidence" / "config.json")
        flags = [
            "--confidence-model",
            generator.url,
            "--confidence-timeout-seconds",
            "2",
            "--confidence-config",
            config,
        ]
        with running(rtap_command(port, *flags), port, "/ready", tmp_path) as started:
            local, remote = (_ask(s, max_cycles=1)["rtap"]["cycles"][0] for s in (server, started))
            assert remote["answer"] == local["answer"]
            assert remote["confidence"] == pytest.approx(local["confidence"], abs=0.02)

            os.killpg(generator.process.pid, signal.SIGKILL)  # its engine processes as well
            generator.process.wait()
            degraded = _ask(started, threshold=1.0)
            assert degraded["rtap"]["degraded"] == "error"
            assert degraded["choices"][0]["message"]["content"] is not None
            assert degraded["rtap"]["stop_reason"] in ("model", "max_cycles")
            assert started.metrics()["rtap_degraded_total{reason=error}"] == 1


def test_logprob_confidence_needs_no_generator(operated):
    reply = _ask(operated, threshold=1.0, max_cycles=2)
    scores = [c["confidence"] for c in reply["rtap"]["cycles"] if c["answer"] is not None]
    assert scores
    assert all(0.0 < s < 1.0 for s in scores)
    assert reply["rtap"]["confidence_tokens"] == 0
    assert reply["choices"][0]["logprobs"] is None  # the engine returned them, the client did not ask
    assert all(c["logprobs"]["tokens"] > 0 for c in reply["rtap"]["cycles"] if c["answer"] is not None)
    headers = {"x-api-key": operated.key}
    scored = httpx.post(f"{operated.url}/v1/rtap/score", json={"question": "1+1", "answer": "2"}, headers=headers)
    assert 0.0 < scored.json()["confidence"] < 1.0


def test_an_uncalibrated_confidence_does_not_weigh_votes(operated):
    vote = _ask(operated, policy="vote", samples=4, threshold=1.0)["rtap"]
    complete = [c for c in vote["cycles"] if c["answer"] is not None]
    assert complete
    assert all(c["confidence"] is None and c["logprobs"]["tokens"] > 0 for c in complete)
    assert sum(one["votes"] for one in vote["candidates"]) == len(complete)
