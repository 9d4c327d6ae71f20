"""Ratios of the overhead benchmark, and what it reads from ``vllm bench serve``."""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import harness
import overhead
import pytest
import uvicorn


def load(slowness: float, ttft: float = 0.01) -> harness.Load:
    return harness.Load(
        seconds=slowness, completed=10, failed=0, tokens=100, ttft=(ttft,) * 10, tpot=(0.001,) * 10,
        chunks=(9, 10) * 5, cpu_seconds=0.02 * slowness,
    )  # fmt: skip


def test_ratios_are_of_pooled_rounds_and_noise_that_hits_both_servers_cancels() -> None:
    slow_minutes = (1.0, 2.0, 5.0, 1.5)  # of the machine, the same for both in a round
    rounds = [{"rtap": load(1.25 * s, 0.02), "vllm": load(s, 0.01)} for s in slow_minutes]
    level = overhead.summarise(8, [rounds[:2], rounds[2:]], overhead.DEMO_BOUNDS)
    assert (level.starts, level.rounds, level.requests_a_round, level.errors) == (2, 4, 10, 0)
    requests, tokens, ttft, p99 = level.figures[:4]
    assert requests.values["vllm"] == pytest.approx(40 / 9.5)
    assert tokens.values["vllm"] == pytest.approx(400 / 9.5)
    assert (requests.ratio.value, requests.ratio.low, requests.ratio.high) == pytest.approx((0.8, 0.8, 0.8))
    assert (requests.is_met, requests.bound, requests.over_base) == (False, ">= 0.98", None)
    assert (ttft.values["rtap"], ttft.values["vllm"], ttft.ratio.value) == pytest.approx((20.0, 10.0, 2.0))
    assert (ttft.is_met, ttft.bound) == (False, "<= 1.05")
    assert p99.is_met is None  # no goal for the 99th percentile
    chunks, cpu = level.figures[-2:]
    assert (chunks.values["rtap"], chunks.ratio.value) == (9.5, 1.0)
    assert (cpu.values["vllm"], cpu.ratio.value) == pytest.approx((1000 * 0.02 * 9.5 / 400, 1.25))


def test_what_differs_from_start_to_start_widens_the_interval_however_many_rounds_each_has() -> None:
    for count in (2, 200):
        starts = [[{"rtap": load(slowness), "vllm": load(1.0)}] * count for slowness in (1.0, 1.25)]
        ratio = overhead.summarise(8, starts, {}).figures[0].ratio
        assert (ratio.low, ratio.high) == pytest.approx((0.8, 1.0))


def test_an_older_checkout_is_compared_in_the_same_rounds() -> None:
    rounds = [{"rtap": load(1.0), "vllm": load(1.0), "base": load(2.0)}] * 3
    level = overhead.summarise(1, [rounds], overhead.DEMO_BOUNDS)
    over_base = level.figures[0].over_base
    assert over_base is not None
    assert (over_base.low, over_base.value, over_base.high) == pytest.approx((2.0, 2.0, 2.0))
    text = overhead.to_markdown({"seed": 0}, [level])
    assert "| figure | rtap | vllm | base | rtap / vllm [95 %] | goal | met | rtap / base [95 %] |" in text
    assert "| requests/s | 10.0 | 10.0 | 5.0 | 1.000 [1.000, 1.000] | >= 0.98 | yes | 2.000 [2.000, 2.000] |" in text


def test_load_comes_from_vllm_bench_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm.benchmarks import serve

    seen: list[argparse.Namespace] = []

    def main(options: argparse.Namespace) -> dict[str, Any]:
        seen.append(options)
        return {
            "duration": 2.0, "completed": 2, "total_output_tokens": 4, "errors": ["", "refused", ""],
            "latencies": [0.5, 0.0, 0.1], "ttfts": [0.2, 0.0, 0.1], "output_lens": [3, 0, 1],
            "itls": [[0.1] * 2, [], []],
        }  # fmt: skip

    monkeypatch.setattr(serve, "main", main)
    monkeypatch.setattr(harness, "LOGS", tmp_path)
    times = iter([(1.0, 0.5, 9.0), (1.5, 0.75, 9.0)])  # user, system, of children
    api = argparse.Namespace(cpu_times=lambda: next(times))
    monkeypatch.setattr(harness, "processes_of", lambda _: [api])
    server = harness.Server("vllm", "http://127.0.0.1:1", Path("model"), {"stop_token_ids": [7]})
    found = harness.bench_serve(server, tmp_path / "p.jsonl", concurrency=8, count=3, seed=5, output_len=64)
    assert (found.seconds, found.completed, found.failed, found.tokens) == (2.0, 2, 1, 4)
    assert found.cpu_seconds == 0.75
    assert found.ttft == (0.2, 0.1)
    assert found.chunks == (3, 1)
    assert found.tpot == pytest.approx((0.15,))  # a completion of one token has no time per further token
    (options,) = seen
    assert (options.max_concurrency, options.num_prompts, options.seed, options.custom_output_len) == (8, 3, 5, 64)
    assert (options.backend, options.endpoint) == ("openai-chat", "/v1/chat/completions")
    assert options.extra_body == {"seed": 5, "stop_token_ids": [7]}


def test_the_first_token_is_the_first_chunk_with_text(tmp_path: Path) -> None:
    def chunk(**delta: str) -> str:
        return f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        parts = [chunk(role="assistant", content=""), ": ping\n\n", chunk(reasoning="Add."), chunk(content="4"),
                 chunk(), 'data: {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 5}}\n\n',
                 "data: [DONE]\n\n"]  # fmt: skip
        for part in parts:
            await asyncio.sleep(0.02)
            await send({"type": "http.response.body", "body": part.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> Any:
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput

        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/chat/completions"
        request = RequestFuncInput("2+2?", url, 1, 8, "rtap")
        async with aiohttp.ClientSession() as session:
            output = await harness.stream_chat(request_func_input=request, session=session, pbar=None)
        server.should_exit = True
        await running
        return output

    output = asyncio.run(ask())
    assert (output.success, output.error, output.generated_text) == (True, "", "Add.4")
    assert (output.output_tokens, output.prompt_len, len(output.itl)) == (3, 5, 1)
    assert 0.05 < output.ttft < output.latency


@pytest.mark.parametrize(("is_old", "module"), [(True, "server"), (False, "rtap_server")])
def test_another_checkout_runs_its_own_server(tmp_path: Path, is_old: bool, module: str) -> None:
    if is_old:
        (tmp_path / "server").mkdir()
        (tmp_path / "server" / "__main__.py").touch()
    command = harness._older_command(tmp_path, [sys.executable, "-m", "rtap_server", "model", "--policy", "single"])
    assert command[-5:] == ["-m", module, "model", "--policy", "single"]
    path = next(word for word in command if word.startswith("PYTHONPATH=")).removeprefix("PYTHONPATH=").split(":")
    assert path[0] == str(tmp_path if is_old else tmp_path / "server")


def test_prompts_are_the_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "LOGS", tmp_path)
    questions = harness.questions_of([])[:3]
    lines = harness.write_prompts(questions).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": question.text} for question in questions]
