"""Resources of a server's processes: memory, files, sockets, threads, tasks, and the growth of memory."""

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import aiohttp
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

from rtap_training.evaluation.statistics import Interval

MIB = 2**20
API, POLICY, GENERATOR = "api", "policy engine", "generator engine"
_BINS = 24  # of a slope: neighbouring samples are correlated, so an interval over single ones would be too narrow


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one time. seconds: since the start of the watch."""

    seconds: float
    role: str
    pid: int
    rss: int
    files: int
    threads: int


@dataclass(frozen=True, slots=True)
class Held:
    """Resources of the API process. tasks: asyncio's. trajectories: choices in flight."""

    files: int
    sockets: int
    threads: int
    tasks: int
    trajectories: int


@dataclass(frozen=True, slots=True)
class Processes:
    """The API process and the policy's engine of one server. The generator's engine changes with restarts."""

    api: psutil.Process
    policy: psutil.Process

    def by_role(self) -> dict[str, psutil.Process]:
        """Running processes; without the generator while it restarts."""
        others = [engine for engine in engines_of(self.api) if engine.pid != self.policy.pid]
        return {API: self.api, POLICY: self.policy, **dict(zip([GENERATOR], others, strict=False))}


def engines_of(api: psutil.Process) -> list[psutil.Process]:
    """Engine processes, in no order."""
    return [child for child in api.children(recursive=True) if "EngineCore" in _command(child)]


async def processes_of(url: str, api: psutil.Process) -> Processes:
    """Find the policy's engine: the one that uses CPU time for an unscored request."""
    engines = engines_of(api)
    before = {engine: _processor_seconds(engine) for engine in engines}
    body = {
        "model": "rtap",
        "prompt": "3+4",
        "max_tokens": 200,
        "ignore_eos": True,
        "rtap": {"policy": "single"},
        "n": 4,
    }
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as reply:
        reply.raise_for_status()
    return Processes(api, max(engines, key=lambda engine: _processor_seconds(engine) - before[engine]))


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def watch(processes: Processes, samples: list[Sample], every_seconds: float) -> None:
    """Append samples until cancelled."""
    began = time.monotonic()
    while True:
        for role, process in processes.by_role().items():
            with suppress(psutil.Error):
                seconds, rss = time.monotonic() - began, process.memory_info().rss
                samples.append(Sample(seconds, role, process.pid, rss, process.num_fds(), process.num_threads()))
        await asyncio.sleep(every_seconds)


async def held(url: str, server: psutil.Process) -> Held:
    """Resources now, this scrape included."""
    figures = await scrape(url)
    return Held(
        files=server.num_fds(),
        sockets=len(server.net_connections("inet")),
        threads=server.num_threads(),
        tasks=int(figures["rtap_asyncio_tasks"]),
        trajectories=int(figures["rtap_trajectories"]),
    )


async def scrape(url: str) -> dict[str, float]:
    """Samples of /metrics: summed over labels by name, and one entry per ``name{labels}``."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as reply:
        text = await reply.text()
    total: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            for key in {sample.name, f"{sample.name}{{{labels}}}"}:
                total[key] = total.get(key, 0.0) + sample.value
    return total


def written(processes: Processes, log: Path) -> int:
    """Bytes that the API process and the policy's engine have written to disk, without their output in ``log``."""
    counters = [cast(Any, process.io_counters()) for process in (processes.api, processes.policy)]
    return sum(counter.write_bytes for counter in counters) - log.stat().st_size


def growth(samples: Sequence[Sample]) -> Interval:
    """MiB per hour by least squares over binned medians, with a 95 % interval; unbounded for few samples."""
    if len(samples) < 6:
        return Interval(math.nan, -math.inf, math.inf)
    seconds = np.array([s.seconds for s in samples])
    mib = np.array([s.rss / MIB for s in samples])
    count = min(_BINS, len(samples) // 2)
    share = (seconds - seconds[0]) / (seconds[-1] - seconds[0])
    place = np.minimum((share * count).astype(int), count - 1)
    bins = [place == b for b in range(count) if (place == b).any()]
    hours = np.array([np.mean(seconds[b]) for b in bins]) / 3600
    fit = cast(Any, stats).linregress(hours, np.array([np.median(mib[b]) for b in bins]))
    half = float(cast(Any, stats).t.ppf(0.975, len(bins) - 2)) * float(fit.stderr)
    return Interval(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half)


def lives(samples: Sequence[Sample], role: str) -> list[list[Sample]]:
    """Samples of a role, one list per process."""
    pids = dict.fromkeys(s.pid for s in samples if s.role == role)
    return [[s for s in samples if s.role == role and s.pid == pid] for pid in pids]
