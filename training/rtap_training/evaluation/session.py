"""Run rules against one server, with progress display and stored runs."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rtap_core.errors import ConfigError
from rtap_training.evaluation.client import Load, RtapServer, judged
from rtap_training.evaluation.measurement import measure
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import Outcome, Reply, Round, Run, RunFile, RunSpec
from rtap_training.evaluation.rules import SINGLE
from rtap_training.tasks import gym


@dataclass(frozen=True, slots=True)
class Session:
    """Settings shared by all runs. resume: reuse stored answers to the same questions under the same settings.
    started: identifies this session; seconds of different sessions are not compared."""

    questions: Mapping[str, Sequence[Question]]
    load: Load
    rounds: int
    directory: Path
    resume: bool
    console: Console
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat())

    async def run_all(self, server: RtapServer, task: str, specs: Sequence[RunSpec]) -> list[Run]:
        """Run every rule on one task. Rules take turns, round by round and every other time in reverse order, so that
        their wall-clock times are comparable."""
        count, files = len(self.questions[task]), dict[RunSpec, RunFile]()
        failed: dict[RunSpec, dict[int, Outcome]] = {spec: {} for spec in specs}
        for spec in specs:
            file = files[spec] = RunFile(self._path(server, task, spec), resume=self.resume)
            for reply in list(file.replies.values()):  # of a session that was killed before it judged them
                file.add(judged(self.questions[task][reply.index], reply))
        rounds = min(self.rounds, count)
        for number in range(rounds):
            part = range(count * number // rounds, count * (number + 1) // rounds)
            for spec in specs if number % 2 == 0 else reversed(specs):
                run = await self._run_part(
                    server, task, spec, [i for i in part if i not in files[spec].outcomes], files
                )
                failed[spec] |= {outcome.index: outcome for outcome in run.outcomes if outcome.error is not None}
                if len(run.answered) == len(part) and run.wall_seconds is not None:
                    files[spec].end_round(number, Round(run.wall_seconds, self.started))
        return [self._finished(task, spec, files[spec], failed[spec], rounds) for spec in specs]

    async def warm_up(self, server: RtapServer) -> None:
        """Start the verifiers, then send a few unmeasured requests. Raises ConfigError if a verifier does not start or
        the server answers no request."""
        for question in (question for rows in self.questions.values() for question in rows):
            if question.gym is not None:
                gym.start(question.gym)
        task, questions = next(iter(self.questions.items()))
        few = questions[: 2 * self.load.concurrency]
        run = await server.run(task, few, RunSpec(SINGLE), self.load, on_outcome=lambda _: None)
        if not run.answered:
            raise ConfigError(f"the server answered none of the first {len(few)} questions: {run.outcomes[0].error}")

    async def _run_part(
        self, server: RtapServer, task: str, spec: RunSpec, only: Sequence[int], files: Mapping[RunSpec, RunFile]
    ) -> Run:
        if not only:
            return Run(task, spec, (), None)
        with self._progress() as progress:
            bar = progress.add_task(f"{task} · {spec.label}", total=len(only), note="")
            seen: list[Outcome] = []

            def keep(reply: Reply) -> None:
                files[spec].add_reply(reply)
                progress.update(bar, advance=1)

            def judge(outcome: Outcome) -> None:
                seen.append(outcome)
                files[spec].add(outcome)
                progress.update(bar, note=_note(seen))

            return await server.run(
                task, self.questions[task], spec, self.load, on_reply=keep, on_outcome=judge, only=only
            )

    def _finished(self, task: str, spec: RunSpec, file: RunFile, failed: Mapping[int, Outcome], rounds: int) -> Run:
        finished = tuple(file.rounds.get(number) for number in range(rounds))
        known = [one.seconds for one in finished if one is not None]
        outcomes = sorted({**failed, **file.outcomes}.values(), key=lambda outcome: outcome.index)
        wall_seconds = sum(known) if len(known) == len(finished) else None
        run = Run(task, spec, tuple(outcomes), wall_seconds, finished)
        self._report(run)
        return run

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def _report(self, run: Run) -> None:
        """Print one line for a finished run, and one with its first error."""
        figures = measure(run)
        accuracy = figures.accuracy
        seconds = "" if run.wall_seconds is None else f", {run.wall_seconds:.1f} s"
        self.console.print(
            f"{run.task} · {run.spec.label}: {accuracy.value:.3f} right [{accuracy.low:.3f}, {accuracy.high:.3f}], "
            f"{figures.policy_tokens.value:.1f} tokens a question{seconds}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        errors = [outcome.error for outcome in run.outcomes if outcome.error is not None]
        if errors:
            sentence = f"  {len(errors)} requests failed; the first: {errors[0]}"
            self.console.print(sentence, style="bold red", markup=False, soft_wrap=True)

    def _path(self, server: RtapServer, task: str, spec: RunSpec) -> Path:
        """File of this run; its name depends on everything that changes the outcome."""
        what = {
            "questions": [asdict(question) for question in self.questions[task]],
            "load": asdict(self.load),
            "rounds": self.rounds,
            "server": [server.model, server.config],
            "spec": asdict(spec),
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{task} {spec.label}").strip("-")
        return self.directory / "runs" / f"{slug}-{digest}.jsonl"


def _note(outcomes: Sequence[Outcome]) -> str:
    errors = sum(outcome.error is not None for outcome in outcomes)
    right = sum(outcome.is_correct for outcome in outcomes)
    accuracy = f"{right / max(len(outcomes) - errors, 1):.2f} right"
    return f"{accuracy}, [bold red]{errors} failed[/]" if errors else accuracy
