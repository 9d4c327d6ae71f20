"""The Python client and its commands against the real server: replies, events, our routes, cancellation."""

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import openai
import pytest

from rtap_client import RTAP, AsyncRTAP, events, trajectory
from tests.e2e.conftest import ROOT, Running

QUESTION = "make 82 from 3, 7, 25"
MESSAGES = [{"role": "user", "content": QUESTION}]
EAGER = {"threshold": 1.0, "max_cycles": 3}  # no confidence reaches 1.0, so three cycles are written
LONG = {"model": "rtap", "messages": MESSAGES, "n": 16, "rtap": {"threshold": 1.0, "max_cycles": 16}}
RUNNING = "vllm:num_requests_running"
ABANDONED = "rtap_requests_total{policy=confidence,stop_reason=abandoned}"


@pytest.fixture
def client(server):
    with RTAP(server.url, max_retries=0, timeout=120) as connected:
        yield connected


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class Abandoned:
    """Callable: a request was abandoned since the start, and none is in flight."""

    def __init__(self, server: Running) -> None:
        self._server, self._before = server, server.metrics().get(ABANDONED, 0)

    def __call__(self) -> bool:
        now = self._server.metrics()
        return now.get(ABANDONED, 0) > self._before and now["rtap_in_flight"] == now[RUNNING] == 0


def test_a_reply_and_its_trajectory(client):
    reply = client.chat.completions.create(
        model="rtap", messages=MESSAGES, seed=9, rtap=EAGER | {"return_cycles": True}
    )
    assert (reply.rtap.stop_reason, len(reply.rtap.cycles)) == ("max_cycles", 3)
    assert reply.choices[0].message.content == reply.rtap.accepted.answer
    assert reply.rtap.accepted.think in reply.choices[0].message.reasoning
    assert reply.usage.completion_tokens == sum(cycle.tokens for cycle in reply.rtap.cycles)
    # The types cover every field of the server.
    assert not reply.rtap.model_extra
    assert not any(cycle.model_extra for cycle in reply.rtap.cycles)
    type(reply.rtap).model_validate(reply.rtap.to_dict())


def test_events_of_the_client_and_of_the_plain_sdk(client, server):
    body = {"model": "rtap", "messages": MESSAGES, "seed": 9, "stream": True, "stream_options": {"include_usage": True}}
    ours = list(events(client.chat.completions.create(**body, rtap=EAGER)))
    plain = list(events(server.client.chat.completions.create(**body, extra_body={"rtap": EAGER})))
    for happened in (ours, plain):
        kinds = [event.type for event in happened]
        assert [event.cycle.index for event in happened if event.type == "cycle"] == [0, 1, 2]
        assert kinds.index("thinking") < kinds.index("cycle") < kinds.index("answer") < kinds.index("done")
        done = happened[-1]
        assert done.text == done.rtap.accepted.answer == "".join(e.text for e in happened if e.type == "answer")
        assert done.usage.completion_tokens == sum(cycle.tokens for cycle in done.rtap.cycles)
    assert ours[-1].text == plain[-1].text


def test_choices_and_parsed_replies_have_trajectories(client):
    reply = client.chat.completions.create(model="rtap", messages=MESSAGES, n=2, rtap=EAGER)
    assert [len(choice.rtap.cycles) for choice in reply.choices] == [3, 3]
    stream = client.chat.completions.create(model="rtap", messages=MESSAGES, n=2, rtap=EAGER, stream=True)
    assert len(list(events(stream))[-1].trajectories) == 2
    parsed = client.chat.completions.parse(model="rtap", messages=MESSAGES, extra_body={"rtap": EAGER})
    assert len(trajectory(parsed).cycles) == 3


async def test_score_feedback_and_config(client, server):
    pairs = [("25*3=75 75+7=82", "25*3+7"), ("25+7=32 32*3=96", "(25+7)*3")]
    right, wrong = (client.score(QUESTION, answer, think=think) for think, answer in pairs)
    assert right.confidence > wrong.confidence
    assert right.confidence_tokens > 0
    reply = client.chat.completions.create(model="rtap", messages=MESSAGES)
    assert client.feedback(reply.id, correct=True).confidence == reply.rtap.confidence
    async with AsyncRTAP(server.url) as other:
        config = await other.config()
        assert (await other.score(QUESTION, pairs[0][1], think=pairs[0][0])).confidence == pytest.approx(
            right.confidence, abs=1e-4
        )
        assert (await other.feedback(reply.id, correct=False)).request_id == reply.id
    assert config.models == ["rtap"]
    assert (config.defaults.policy, config.confidence.kind) == ("confidence", "pooling")
    type(config).model_validate(config.to_dict())
    with pytest.raises(openai.NotFoundError):
        client.feedback("chatcmpl-unknown", correct=True)


def test_leaving_the_events_stops_the_server(client, server):
    abandoned = Abandoned(server)
    for event in events(client.chat.completions.create(**LONG, stream=True)):
        if event.type == "cycle":
            break
    until(abandoned)


async def test_cancelling_a_task_stops_the_server(server):
    abandoned = Abandoned(server)
    async with AsyncRTAP(server.url, max_retries=0) as client:
        asking = asyncio.create_task(client.chat.completions.create(**LONG))
        while (await asyncio.to_thread(server.metrics))["rtap_in_flight"] < 1:
            assert not asking.done()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await asyncio.to_thread(until, abandoned)


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; from rtap_client.{name} import main; sys.exit(main())", *arguments]


def environment(server: Running) -> dict[str, str]:
    known = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    paths = os.pathsep.join([*known, str(ROOT), str(ROOT / "clients" / "python")])
    return {**os.environ, "PYTHONPATH": paths, "RTAP_URL": server.url, "TERM": "xterm-256color", "COLUMNS": "110"}


def test_ask_prints_the_answer_and_names_the_models(server):
    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("ask", *arguments), env=environment(server), input=QUESTION, text=True, capture_output=True,
            timeout=120, check=False,
        )  # fmt: skip

    plain, as_json = ask(QUESTION, "--seed", "9"), ask("-", "--seed", "9", "--json")
    assert (plain.returncode, as_json.returncode, plain.stderr) == (0, 0, "")
    assert plain.stdout == json.loads(as_json.stdout)["answer"] + "\n"
    wrong = ask("hello", "--model", "gpt")
    assert wrong.returncode == 1
    assert wrong.stderr.endswith("name one of its models with --model: rtap\n")
    assert wrong.stderr.count("\n") == 1


def _take_terminal() -> None:
    """In the child: take the controlling terminal and accept Ctrl-C, which a shell's background jobs ignore."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_chat_shows_cycles_and_ctrl_c_stops_the_server(server):
    abandoned = Abandoned(server)
    terminal, its_side = pty.openpty()
    process = subprocess.Popen(
        command("chat", "--threshold", "1", "--max-cycles", "16", "--seed", "9"),
        stdin=its_side, stdout=its_side, stderr=its_side, env=environment(server), start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(its_side)
    screen = ""

    def read_until(pattern: str) -> None:
        nonlocal screen
        end = time.monotonic() + 60
        while not re.search(pattern, screen):
            assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], screen
            screen += re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", os.read(terminal, 65536).decode(errors="replace"))

    try:
        read_until("/help for commands[^>]*> ")
        for _ in range(5):  # on a busy machine all cycles may be done before the screen shows one
            screen = ""
            os.write(terminal, f"{QUESTION}\n".encode())
            read_until("1 ✗ .*│")
            os.write(terminal, b"\x03")
            read_until("stopped after [0-9.]+ s|Ctrl-D or /quit leaves")
            time.sleep(0.5)
            if abandoned():
                break
        until(abandoned)
        read_until("stopped after [0-9.]+ s")
        screen = ""
        os.write(terminal, f"/set --threshold 0 --max-cycles 1\n{QUESTION}\n/right\n".encode())
        read_until("─ answer ─")
        read_until("noted; [0-9]+ verdict")
        os.write(terminal, b"/quit\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_doctor_finds_the_server(server):
    done = subprocess.run(
        command("doctor", "--json"), env=environment(server), capture_output=True, text=True, timeout=120, check=False
    )
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["server"]["status"] == "ok"
    assert "confidence by pooling" in found["server"]["found"]


DOCS = (ROOT / "docs" / "clients.md").read_text("utf-8")


@pytest.mark.slow
def test_the_commands_of_the_docs_run(server, tmp_path):
    (tmp_path / "question.txt").write_text(QUESTION)
    (tmp_path / "rtap").write_text(f'#!/bin/sh\nexec {sys.executable} -m rtap_client.cli "$@"\n')
    (tmp_path / "rtap").chmod(0o755)
    env = environment(server) | {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    (script,) = re.findall(r"```sh\n(rtap ask.*?)```", DOCS, re.DOTALL)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    confidence, answer = done.stdout.splitlines()
    assert 0 <= float(confidence) <= 1
    assert "no answer" not in answer
