"""`rtap eval` from command line to result files, against a fake server."""

import asyncio
import csv
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rtap_core.errors import ConfigError
from rtap_training.evaluation import question_files
from rtap_training.evaluation.evaluate import main
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.tasks import gym
from tests.other_checkpoints import save_generator_adapter
from tests.training.rl.tiny import BUNDLED
from tests.training.test_generator import kept_samples

QUESTIONS = 60
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class FakeServer:
    """Answer "right" with a probability that depends on the question, with higher confidence if right.

    Results depend on the request's seed only. fail: every n-th request gets an error.
    """

    url: str = ""
    fail: int | None = None
    degraded: str | None = None
    kind: str = "pooling"
    api_key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)

    async def config(self, request: Request) -> Response:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": {"message": "no key"}}, status_code=401)
        return JSONResponse(
            {
                "limits": {"max_cycles": 16, "samples": 16},
                "confidence": {"kind": self.kind, "is_calibrated": self.kind != "none"},
            }
        )

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake"}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if self.fail is not None and len(self.requests) % self.fail == 0:
            return JSONResponse({"error": {"message": "the engine is [gone]"}}, status_code=500)
        return JSONResponse(self.reply(body))

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        rtap = body["rtap"]
        policy, rng = rtap["policy"], random.Random(body["seed"])
        most = {"single": 1, "model": 2, "vote": rtap.get("samples", 8)}.get(policy, rtap.get("max_cycles", 8))
        cycles: list[dict[str, Any]] = []
        if policy == "vote" and rtap["threshold"] < 1:
            most //= 2  # an adaptive vote
        while len(cycles) < most:
            right = rng.random() < 0.5
            confidence = min(max(rng.gauss(0.7 if right else 0.4, 0.15), 0.0), 1.0)
            cycles.append(self.cycle(len(cycles), "right" if right else f"wrong {rng.randrange(3)}", confidence))
            if policy == "confidence" and confidence >= rtap["threshold"]:
                break
        best = max(cycles, key=lambda cycle: cycle["confidence"] or 0.0)
        tokens = sum(cycle["tokens"] for cycle in cycles)
        return {
            "choices": [{"message": {"role": "assistant", "content": best["answer"], "reasoning": "…"}}],
            "usage": {"completion_tokens": tokens},
            "rtap": {
                "policy": policy,
                "stop_reason": "threshold" if len(cycles) < most else "max_cycles",
                "confidence": best["confidence"],
                "first_answer_seconds": 0.01,
                "confidence_tokens": tokens + 5,
                "discarded_tokens": 0,
                "cycles": sorted(cycles, key=lambda cycle: cycle["answer"]) if policy == "vote" else cycles,
                **({"degraded": self.degraded} if self.degraded else {}),
            },
        }

    def cycle(self, index: int, answer: str, confidence: float) -> dict[str, Any]:
        return {
            "index": index,
            "answer": answer,
            "think": "hm",
            "text": f"It is {answer}",
            "confidence": None if self.kind == "none" else confidence,
            "accepted": False,
            "tokens": 20,
            "oops_tokens": int(index > 0),
            "cached_tokens": 32 * index,
            "prompt_tokens": 32 * index + 9,
            "seconds": 0.01,
            "confidence_seconds": 0.001,
        }


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def serving(kind: str) -> Generator[FakeServer]:
    """A fake server on a real socket, in a thread."""
    behaviour = FakeServer(kind=kind)
    routes = [
        Route("/v1/rtap/config", behaviour.config),
        Route("/v1/models", behaviour.models),
        Route("/v1/chat/completions", behaviour.chat, methods=["POST"]),
    ]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    wait_for(lambda: server.started)
    behaviour.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield behaviour
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving("pooling") as behaviour:
        yield behaviour


@pytest.fixture
def plain() -> Iterator[FakeServer]:
    """Without a confidence."""
    with serving("none") as behaviour:
        yield behaviour


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "demo.jsonl"
    rows = [{"question": f"demo question {i}?", "answer": "right"} for i in range(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(fake: FakeServer, questions: Path, *more: str) -> int:
    output = str(questions.parent / "out")
    return main(["--server", fake.url, "--questions", str(questions), "--output", output, *more])


def results_of(questions: Path) -> dict[str, Any]:
    return json.loads((questions.parent / "out" / "results.json").read_text(encoding="utf-8"))


def by_label(task: dict[str, Any], *, live: bool = True) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in task["rows"] if row["is_live"] == live}


def test_all_rules_are_measured_and_written(
    fake: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(fake, questions, "--thresholds", "0.5,0.7", "--samples", "2,8", "--seed", "3") == 0
    results = results_of(questions)
    task = results["tasks"][0]
    rows, replayed = by_label(task), by_label(task, live=False)
    assert rows.keys() >= {"single", "model", "vote x8", "cges@0.85 x8", "confidence@0.5", "confidence@0.7"}
    assert replayed.keys() >= {"single", "majority x2", "majority x8", "adaptive@0.85 x8", "adaptive@0.8 x8"}
    assert replayed.keys() >= {"weighted x2", "weighted x8", "cges@0.85 x8", "confidence@0.5 x8", "majority x8 by text"}
    for row in task["rows"]:
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
        assert row["tokens"]["value"] == pytest.approx(20 * row["samples"])
        assert row["token_ratio"]["value"] == pytest.approx(row["samples"] / 8)
    assert {row["n"] for row in task["rows"]} - {QUESTIONS} == {
        row["n"] for row in task["rows"] if "chosen" in row["label"]
    }
    # samples come back sorted by answer; were they cut in that order, two would nearly always be right or both wrong
    assert 0.35 < replayed["majority x2"]["accuracy"]["value"] < 0.65
    assert replayed["majority x8"]["difference"]["value"] == 0.0
    assert rows["confidence@0.7"]["samples"] > rows["confidence@0.5"]["samples"] > rows["single"]["samples"] == 1
    assert rows["confidence@0.7"]["accuracy"]["value"] > rows["single"]["accuracy"]["value"]
    assert rows["cges@0.85 x8"]["samples"] == 4
    assert rows["vote x8"]["wall_ratio"]["value"] == pytest.approx(1.0)
    assert replayed["majority x8"]["wall_ratio"] is None
    assert {m["errors"] for m in task["measurements"]} == {0}
    confidence = next(m for m in task["measurements"] if m["spec"]["threshold"] == 0.7)
    assert confidence["costs"]["most_recomputed"] == 9
    assert task["judgement"]["answers"] == 8 * QUESTIONS
    assert 0.85 < task["judgement"]["within"]["auroc"]["value"] < 0.97  # two gaussians two deviations apart: 0.92
    assert results["setting"]["load"]["seed"] == 3
    assert "--seed 3" in results["setting"]["command"]
    shown = capsys.readouterr().out
    assert "demo · confidence@0.5:" in shown
    assert "AUROC" in shown


def test_csv_and_markdown_and_plot_tell_the_same(fake: FakeServer, questions: Path) -> None:
    assert evaluate(fake, questions, "--policies", "single,confidence,vote", "--thresholds", "0.6") == 0
    output = questions.parent / "out"
    lines = (output / "results.csv").read_text(encoding="utf-8").splitlines()
    rows = {row["label"]: row for row in csv.DictReader(lines) if row["is_live"] == "True"}
    single = by_label(results_of(questions)["tasks"][0])["single"]
    assert float(rows["single"]["accuracy"]) == single["accuracy"]["value"]
    assert float(rows["single"]["token_ratio_low"]) == single["token_ratio"]["low"]
    markdown = (output / "results.md").read_text(encoding="utf-8")
    assert f"| single | live | {QUESTIONS} | {single['accuracy']['value']:.3f} [" in markdown
    assert "| adaptive@0.85 x16 | replayed |" in markdown
    png = (output / "accuracy_vs_tokens.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) >= (800, 600)
    assert not list(output.glob("*.partial"))


def test_kept_samples_give_the_same_rows_without_a_server(
    plain: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(plain, questions, "--samples", "2,4") == 0
    (task,) = results_of(questions)["tasks"]
    assert by_label(task).keys() == {"single", "vote x4", "adaptive@0.85 x4"}  # all that this server can
    file, again = questions.parent / "out" / "samples.jsonl", questions.parent / "again"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 4 * QUESTIONS
    assert lines[0].keys() == {
        "task", "question", "reference", "sample", "think", "text", "answer", "is_correct", "tokens", "confidence",
        "logprobs", "kind", "logistic",
    }  # fmt: skip
    assert main(["--from-samples", str(file), "--samples", "2,4", "--output", str(again)]) == 0
    (replayed,) = json.loads((again / "results.json").read_text())["tasks"]
    assert by_label(replayed) == {}
    assert by_label(replayed, live=False) == by_label(task, live=False)
    assert main(["--from-samples", str(file), "--server", "x"]) == 2
    assert main(["--from-samples", str(file), "--questions", str(questions)]) == 2
    error = capsys.readouterr().err
    assert "needs no server" in error
    assert "has its own questions" in error
    for more in (["--policies", "vote"], ["--prompt", "{question}"], ["--resume"]):
        assert main(["--from-samples", str(file), *more]) == 2
        assert "asks no server; omit" in capsys.readouterr().err
    for more in (["--confidence-model", "G"], ["MODEL"]):
        assert main([*more, "--from-samples", str(file)]) == 2
        assert "give both, to score the samples, or neither" in capsys.readouterr().err


def test_kept_samples_are_scored_by_a_generator_without_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, generator = kept_samples(tmp_path / "samples.jsonl"), save_generator_adapter(tmp_path / "generator")
    flags = [str(BUNDLED / "policy"), "--from-samples", str(samples), "--confidence-model", str(generator)]
    assert main([*flags, "--samples", "2", "--output", str(tmp_path)]) == 2
    assert "would be replaced" in capsys.readouterr().err
    output = tmp_path / "out"
    assert main([*flags, "--samples", "2", "--output", str(output)]) == 0
    scored = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert all(0 < row["confidence"] < 1 and row["kind"] == "pooling" for row in scored)
    (task,) = json.loads((output / "results.json").read_text())["tasks"]
    rows = by_label(task, live=False)
    judged = rows["weighted x2"]
    assert judged["total_token_ratio"] > judged["token_ratio"]["value"]  # what the generator read is counted
    read = sum(row["confidence_tokens"] for row in scored) / sum(row["tokens"] for row in scored)
    assert judged["total_token_ratio"] == pytest.approx(judged["token_ratio"]["value"] + read, rel=0.01)


def test_rules_take_turns_in_rounds(plain: FakeServer, questions: Path) -> None:
    more = ("--policies", "vote,adaptive", "--samples", "4", "--concurrency", "3", "--rounds", "3")
    assert evaluate(plain, questions, *more) == 0
    thresholds = [body["rtap"].get("threshold") for body in plain.requests if body["rtap"]["policy"] == "vote"]
    assert [thresholds[i] for i in range(0, 2 * QUESTIONS, QUESTIONS // 3)] == [1.0, 0.85, 0.85, 1.0, 1.0, 0.85]
    row = by_label(results_of(questions)["tasks"][0])["adaptive@0.85 x4"]
    assert row["wall_ratio"]["low"] <= row["wall_ratio"]["value"] <= row["wall_ratio"]["high"]


def test_requests_carry_policy_seed_and_limits_and_repeat_exactly(fake: FakeServer, questions: Path) -> None:
    more = ("--policies", "confidence", "--thresholds", "0.5", "--max-cycles", "4", "--limit", "10")
    assert evaluate(fake, questions, *more, "--concurrency", "3", "--temperature", "0.7", "--max-tokens", "99") == 0
    first = fake.requests[-10:]
    assert all(r["rtap"] == first[0]["rtap"] for r in first)
    assert first[0]["rtap"] == {"policy": "confidence", "threshold": 0.5, "max_cycles": 4, "return_cycles": True}
    assert (first[0]["model"], first[0]["temperature"], first[0]["max_completion_tokens"]) == ("fake", 0.7, 99)
    assert len({r["seed"] for r in first}) == 10
    accuracy = results_of(questions)["tasks"][0]["measurements"][0]["accuracy"]
    assert evaluate(fake, questions, *more) == 0
    assert {r["seed"] for r in fake.requests[-10:]} == {r["seed"] for r in first}
    assert results_of(questions)["tasks"][0]["measurements"][0]["accuracy"] == accuracy


def test_failed_and_degraded_requests_are_counted_and_shown(
    fake: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fail, fake.degraded = 10, "timeout"
    assert evaluate(fake, questions, "--policies", "single", "--concurrency", "2") == 1
    row = results_of(questions)["tasks"][0]["measurements"][0]
    assert (row["n"], row["errors"], row["costs"]["degraded"]) == (54, 6, 54)
    assert sum(row["error_messages"].values()) == 6
    assert "6 failed: HTTP 500" in (questions.parent / "out" / "results.md").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert "6 requests failed; the first: HTTP 500" in shown
    assert "the engine is [gone]" in shown


def test_a_reply_without_the_rtap_field_is_an_error_of_its_own(
    fake: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fake.reply

    def every_other(body: dict[str, Any]) -> dict[str, Any]:
        reply = plain(body)
        if len(fake.requests) % 2:
            del reply["rtap"]
        return reply

    monkeypatch.setattr(fake, "reply", every_other)
    assert evaluate(fake, questions, "--policies", "single", "--concurrency", "2") == 1
    assert "invalid reply (KeyError: 'rtap')" in capsys.readouterr().out


def test_resume_asks_only_what_is_missing(fake: FakeServer, questions: Path) -> None:
    more = ("--policies", "single,confidence", "--thresholds", "0.5", "--concurrency", "4")
    assert evaluate(fake, questions, *more) == 0
    before, asked = results_of(questions), len(fake.requests)
    file = next((questions.parent / "out" / "runs").glob("demo-single-*"))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:50]) + '{"index')  # killed after 50 questions
    assert evaluate(fake, questions, *more, "--resume") == 0
    warm_up = 8
    assert len(fake.requests) == asked + warm_up + QUESTIONS - 50
    again = results_of(questions)
    assert again["tasks"][0]["measurements"][1] == before["tasks"][0]["measurements"][1]
    single = [results["tasks"][0]["measurements"][0] for results in (before, again)]
    assert single[0]["accuracy"] == single[1]["accuracy"]
    assert single[1]["costs"]["wall_seconds"] is None  # of an interrupted run
    assert evaluate(fake, questions, *more, "--resume", "--seed", "1") == 0  # another seed is another evaluation
    assert len(fake.requests) == asked + 2 * warm_up + 3 * QUESTIONS - 50


def test_another_reference_answer_is_another_evaluation(fake: FakeServer, questions: Path) -> None:
    more = ("--policies", "single", "--limit", "3", "--resume")
    assert evaluate(fake, questions, *more) == 0
    asked = len(fake.requests)
    questions.write_text(questions.read_text().replace('"right"', '"left"'))
    assert evaluate(fake, questions, *more) == 0
    assert len(fake.requests) == 2 * asked
    assert results_of(questions)["tasks"][0]["measurements"][0]["accuracy"]["value"] == 0.0


def test_a_verifier_that_does_not_start_ends_the_evaluation_before_the_first_request(
    fake: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = gym.GymQuestion("2 + 3?", "5", "nothing", "nothing", "{}", 0)

    def read(_: str) -> list[gym.GymQuestion]:
        return [entry]

    monkeypatch.setattr(question_files, "read_dataset", read)
    assert main(["--server", fake.url, "--questions", "rg:nothing", "--output", str(questions.parent / "out")]) == 2
    assert "the verifier of nothing does not start" in capsys.readouterr().err
    assert fake.requests == []


def test_judging_is_not_timed(fake: FakeServer, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: Question, answer: str | None) -> bool:
        time.sleep(0.5)
        return answer == "right"

    monkeypatch.setattr(Question, "is_right", slow)
    assert evaluate(fake, questions, "--policies", "single", "--limit", "4", "--concurrency", "1") == 0
    assert (
        results_of(questions)["tasks"][0]["measurements"][0]["costs"]["wall_seconds"] < 2.0
    )  # judging takes 4 seconds


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--thresholds", "0.5,1.2"], "'1.2' must be a number from 0 to 1"),
        (["--thresholds", "0.5,"], "must be a comma-separated list"),
        (["--policies", "single,best"], "'best' is not a policy; choose from confidence, single"),
        (["--samples", "0"], "'0' must be an integer of at least 1"),
        (["--concurrency", "many"], "'many' must be an integer"),
        (["--temperature", "nan"], "'nan' must be a number from 0 to 2"),
        (["--quesions", "x"], "(did you mean --questions?)"),
    ],
)
def test_a_bad_flag_gets_one_sentence(
    flags: list[str], sentence: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--questions", str(questions), *flags])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["x"], "give only one of them"),
        (["--", "--max-model-len", "9"], "give only one of them"),
        (["--max-cycles", "17"], "--max-cycles 17 is above the server's limit of 16"),
        (["--samples", "17"], "--samples 17 is above the server's limit of 16"),
        (["--questions", "/nowhere.jsonl"], "cannot read the question file /nowhere.jsonl"),
        (["--server", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_settings_that_cannot_work_get_one_sentence_and_status_2(
    flags: list[str], sentence: str, fake: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(fake, questions, *(fake.url if flag == "URL" else flag for flag in flags)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_server_without_a_confidence_cannot_measure_the_confidence_rule(
    plain: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(plain, questions, "--policies", "single,confidence") == 2
    assert "the server has no confidence; start it with --confidence-model or --confidence" in capsys.readouterr().err
    assert evaluate(plain, questions, "--policies", "single") == 0


def test_a_key_is_sent_and_a_missing_one_is_named(
    fake: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RTAP_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")  # not this server's to see
    fake.api_key = "secret"
    assert evaluate(fake, questions, "--policies", "single") == 2
    assert "answered 401; set RTAP_API_KEY to its key" in capsys.readouterr().err
    assert evaluate(fake, questions, "--policies", "single", "--api-key=secret") == 0
    monkeypatch.setenv("RTAP_API_KEY", "secret")
    assert evaluate(fake, questions, "--policies", "single") == 0
    assert "secret" not in json.dumps(results_of(questions))


def test_without_questions_the_bundled_ones_are_asked(fake: FakeServer, questions: Path) -> None:
    output = str(questions.parent / "out")
    assert main(["--server", fake.url, "--policies", "single", "--limit", "2", "--output", output]) == 0
    asked = results_of(questions)["setting"]["questions"]
    assert asked == {"arithmetic": 2, "countdown": 2}


def test_a_server_that_answers_nothing_ends_the_evaluation(
    fake: FakeServer, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fail = 1
    assert evaluate(fake, questions, "--policies", "single", "--concurrency", "2") == 2
    assert "answered none of the first 4 questions: HTTP 500" in capsys.readouterr().err
    assert len(fake.requests) == 4


def test_a_served_model_is_started_asked_and_stopped(tmp_path: Path) -> None:
    script = tmp_path / "ready.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from http.server import BaseHTTPRequestHandler, HTTPServer

            class Ready(BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(200 if self.path == "/ready" else 404)
                    self.end_headers()

            HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Ready).serve_forever()
        """),
        encoding="utf-8",
    )
    with running_server([sys.executable, str(script)], log=tmp_path / "server.log", ready_seconds=30) as url:
        assert httpx.get(f"{url}/ready").status_code == 200
        port = int(url.rsplit(":", 1)[1])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("rtap serve: loading x\nrtap serve: no model at x\nwarnings.warn(", "rtap serve: no model at x"),
        ("rtap serve: loading x\nMemoryError: 3 GB", "MemoryError: 3 GB"),
        ("rtap serve: loading x\nrtap serve: model: x\nMemoryError: 3 GB", "MemoryError: 3 GB"),
        (
            "Maybe `OSError: [Errno 24]`\n(Worker) ERROR [exec.py:9] ValueError: no memory\nRuntimeError: see above",
            "ValueError: no memory",
        ),
        ("just\nstopped", "stopped"),
    ],
)
def test_a_server_that_cannot_start_is_explained_by_its_log(tmp_path: Path, log: str, cause: str) -> None:
    command = [sys.executable, "-c", f"print({log!r}); raise SystemExit(1)"]
    with (
        pytest.raises(ConfigError) as caught,
        running_server(command, log=tmp_path / "server.log", ready_seconds=30),
    ):
        pass
    assert f"exited before it was ready: {cause} (full log: " in str(caught.value)


def test_a_server_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    with (
        pytest.raises(ConfigError, match="was not ready after 1 s"),
        running_server(sleeper, log=tmp_path / "server.log", ready_seconds=1),
    ):
        pass
    assert not Path(f"/proc/{(tmp_path / 'server.log').read_text().strip()}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_does_not_outlive_an_evaluation_that_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from rtap_training.evaluation.server_process import running_server
        sleeper = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
        with running_server(sleeper, log=Path(sys.argv[1]), ready_seconds=60):
            pass
    """)
    log = tmp_path / "server.log"
    # the test run itself may ignore SIGHUP, and a child would inherit that
    with subprocess.Popen(
        [sys.executable, "-c", script, str(log)], cwd=ROOT, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)
    ) as evaluation:
        try:
            wait_for(lambda: log.exists() and log.read_text().strip())
            server = Path(f"/proc/{log.read_text().strip()}")
            assert server.exists()
        finally:
            evaluation.send_signal(number)
        assert evaluation.wait(20) == 128 + number
        assert not server.exists()


def test_the_serve_command_names_model_and_generator() -> None:
    assert serve_command(None, None, []) == [sys.executable, "-m", "rtap_server"]
    command = serve_command("policy", "judge", ["--max-model-len", "512"])
    assert command[2:] == ["rtap_server", "policy", "--confidence-model", "judge", "--max-model-len", "512"]
