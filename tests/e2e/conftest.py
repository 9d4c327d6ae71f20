"""Real server processes with the bundled models, shared by all tests of a session.

Streaming and disconnects need them: Starlette's TestClient and httpx's ASGITransport read a whole response before they
return. A server starts in 25 to 60 seconds, so a new test uses one of the three here where it can."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.otlp import Receiver, receiving
from tests.other_checkpoints import save_adapter, save_think

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "deploy" / "models"
# Defaults of `rtap serve` for the bundled models on a CPU, as flags of plain `vllm serve`.
VLLM_FLAGS = ["--no-enable-chunked-prefill", "--block-size", "32", "--enforce-eager"]
VLLM_EXECUTOR = ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
Result = TypeVar("Result")
START_SECONDS = 240  # generous: two test servers may be starting on two busy cores


@dataclass
class Running:
    """A server process. client: the official SDK with ``key``."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    start_seconds: float
    key: str = "none"
    metrics_key: str = "none"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics summed over labels, and one entry per ``name{labels}``."""
        total: dict[str, float] = {}
        text = httpx.get(f"{self.url}/metrics", headers={"x-api-key": self.metrics_key}).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                for key in {sample.name, f"{sample.name}{{{labels}}}"}:
                    total[key] = total.get(key, 0.0) + sample.value
        return total


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, ready: str, folder: Path, **environment: str) -> Generator[Running]:
    """Start a server, wait until it is ready, and stop it with its children at the end."""
    log = folder / f"server-{port}.log"
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT, **environment}, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url + ready, timeout=2).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                pytest.fail(f"{command} did not become ready:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield Running(url, process, log, time.monotonic() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def side_by_side(ours: Callable[[], Result], reference: Callable[[], Result]) -> tuple[Result, Result]:
    """Both results, computed at the same time: one for each server."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(ours), pool.submit(reference)
        return first.result(), second.result()


def rtap_command(port: int, *flags: str) -> list[str]:
    return [sys.executable, "-m", "rtap_server", "--host", "127.0.0.1", "--port", str(port), *flags]


def vllm_command(model: str, port: int, *flags: str) -> list[str]:
    import torch

    from rtap_server.engine.engine_config import emulates_bfloat16  # here, because it imports vLLM

    dtype = "float32" if emulates_bfloat16(torch.cpu.get_capabilities()) else "auto"
    # What `vllm serve` runs. That command itself cannot start on vllm-cpu: it asks for the version of a package "vllm".
    module = "vllm.entrypoints.launchers.api_server.entry"
    model_flags = ["--model", str(MODELS / model), "--dtype", dtype, *VLLM_FLAGS, *VLLM_EXECUTOR]
    return [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), *model_flags, *flags]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`rtap serve` without flags: bundled policy and generator."""
    port = free_port()
    with running(rtap_command(port), port, "/ready", tmp_path_factory.mktemp("rtap")) as started:
        yield started


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Plain `vllm serve` of the same policy, as reference."""
    port = free_port()
    command = vllm_command("policy", port, "--served-model-name", "rtap", "--kv-cache-memory-bytes", str(2**30))
    with running(command, port, "/health", tmp_path_factory.mktemp("vllm")) as started:
        yield started


KEYS = """
[[keys]]
name = "team"
key = "key-team"
[[keys]]
name = "limited"
key = "key-limited"
requests_per_minute = 2
[[keys]]
name = "prometheus"
key = "key-scrape"
scope = "metrics"
"""
ADAPTER = "adapted"


@pytest.fixture(scope="session")
def receiver() -> Iterator[tuple[Receiver, str]]:
    """An OTLP receiver and its address."""
    with receiving() as found:
        yield found


@pytest.fixture(scope="session")
def operated(receiver: tuple[Receiver, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`rtap serve` with an operator's flags: keys, JSON log and traces; the `think` format, an adapter and tools.

    Confidence comes from log-probabilities, so that one engine is enough. The keys are in keys.toml next to the log."""
    folder, port = tmp_path_factory.mktemp("operated"), free_port()
    (folder / "keys.toml").write_text(KEYS)
    command = rtap_command(
        port, str(save_think("policy", folder / "policy")), "--served-model-name", "rtap", "--confidence", "logprob",
        "--enforce-eager", "--kv-cache-memory-bytes", str(2**29),
        "--api-keys-file", str(folder / "keys.toml"), "--log-format", "json", "--otlp-traces-endpoint", receiver[1],
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={save_adapter(folder / 'lora', seed=1)}",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--uvicorn-log-level", "debug",
    )  # fmt: skip
    tracing = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with running(command, port, "/ready", folder, **tracing) as started:
        yield replace(started, key="key-team", metrics_key="key-scrape")
