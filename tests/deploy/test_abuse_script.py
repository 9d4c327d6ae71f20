"""The abuse test sees a stalled loop, a failing request, memory that stays, a 5xx and a held connection."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.server.live import serving
from tests.stress import abuse, abuse_attacks
from tests.stress.abuse import Row, Watch, attack_once, to_json, to_markdown
from tests.stress.abuse_attacks import ATTACKS, MIB, Attack, Outcome, Target, run_attack


@contextmanager
def server(*, stall_seconds: float = 0, status: int = 400, good_seconds: float = 0) -> Iterator[Target]:
    """Answers every completion with ``status``, after blocking its event loop, and good requests after a while."""

    async def answer(request: Request) -> Response:
        body = await request.body()
        if request.url.path == "/v1/chat/completions":
            await asyncio.sleep(good_seconds)
        if request.url.path == "/v1/completions":
            time.sleep(stall_seconds)
        is_good = b'"max_tokens": 96' in body
        return JSONResponse({}, 200 if is_good or request.method == "GET" else status)

    routes = [Route("/{path:path}", answer, methods=["GET", "POST"])]
    with serving(Starlette(routes=routes)) as port:
        yield Target(f"http://127.0.0.1:{port}")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(abuse, "_SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(abuse_attacks, "HELD_SECONDS", 0.5)


def attack_of(name: str) -> Attack:
    return next(attack for attack in ATTACKS if attack.name == name)


async def row_of(name: str, target: Target) -> Row:
    with ThreadPoolExecutor(1) as pool:
        return await attack_once(attack_of(name), target, "", list, pool)


async def test_a_sound_server_keeps_everything():
    with server() as target:
        row = await row_of("multiplied-completion", target)
    assert row.problems == []
    assert row.outcome.replies == {"400": 1}
    assert len(row.watch.live) > 2
    assert row.watch.good


async def test_large_bodies_are_sent_whole():
    with server() as target:
        outcome = await asyncio.to_thread(run_attack, "duplicate-content-types", target)
    assert (outcome.problems, outcome.replies) == ([], {"400": 6})


async def test_a_good_request_that_outlives_the_attack_is_waited_for():
    with server(good_seconds=1) as target:
        row = await row_of("multiplied-completion", target)
    assert row.problems == []
    assert max(row.watch.good) >= 1


async def test_a_stalled_loop_is_seen_by_the_probe():
    with server(stall_seconds=0.8) as target:
        row = await row_of("multiplied-completion", target)
    assert [problem.partition(" took")[0] for problem in row.problems] == ["/live"]


async def test_a_5xx_is_a_problem_whoever_it_answers():
    with server(status=500) as target:
        row = await row_of("invalid-grammars", target)
    assert row.outcome.problems
    assert all(problem.startswith("500") for problem in row.outcome.problems)


def test_bounds_of_a_row():
    row = Row("a", "b", 1.0, Watch(live=[0.4], good=[1.9]), 100 * MIB, 105 * MIB, Outcome())
    assert row.problems == []
    assert len(replace(row, after=106 * MIB).problems) == 1
    assert len(replace(row, watch=Watch(live=[0.6], good=[2.1], failures=["500: x"])).problems) == 3
    assert replace(row, outcome=Outcome(problems=["x"])).problems == ["x"]
    broken = replace(row, after=200 * MIB)
    assert "| **no** |" in to_markdown({}, [broken])
    assert "- a: memory is 100% above" in to_markdown({}, [broken])
    assert json.loads(json.dumps(to_json({}, [row, broken])))["attacks"][1]["problems"] == broken.problems


@contextmanager
def silent() -> Iterator[Target]:
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield Target(f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize("name", ["unauthenticated-bodies", "slow-bodies"])
async def test_connections_that_stay_are_counted(name):
    with silent() as target:
        outcome = await asyncio.to_thread(run_attack, name, target)
    assert outcome.replies["held"] in (100, 150)
    assert "are still held" in outcome.problems[0]


async def test_a_closed_connection_and_a_forged_line_are_problems(tmp_path):
    with server() as target:
        outcome = await asyncio.to_thread(run_attack, "invalid-bytes", target)
        assert outcome.problems == []
        log = tmp_path / "log"
        log.write_text('INFO fine\n{"level": "ERROR", "message": "FORGED by tests.stress.abuse"}\n')
        outcome = await asyncio.to_thread(run_attack, "forged-log-record", replace(target, log=log))
    assert ["forged line" in problem for problem in outcome.problems] == [True]


def test_a_failure_of_the_attack_is_a_problem():
    outcome = run_attack("multiplied-completion", Target("http://127.0.0.1:1"))
    assert outcome.replies == {"closed": 1}
    assert run_attack("half-headers", Target("http://127.0.0.1:1")).problems[0].startswith("the attack failed")


def test_attacks_have_names_and_expectations():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) == 12
    assert all(attack.expected and attack.run.__doc__ for attack in ATTACKS)


@pytest.mark.parametrize(
    ("line", "is_failure"),
    [
        (b'data: {"error": {"type": "server_error", "message": "x"}}', True),
        (b'data: {"error": {"type": "invalid_request_error", "message": "x"}}', False),
        (b'data: {"choices": []}', False),
        (b"data: [DONE]", False),
        (b"", False),
    ],
)
def test_only_the_servers_own_failures_in_a_stream_count(line, is_failure):
    assert abuse_attacks._is_server_error(line) is is_failure
