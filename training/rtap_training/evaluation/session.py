"""Run rules against one server, with progress display and stored runs."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rtap_core.errors import ConfigError
from rtap_training.evaluation.client import Checker, Load, RtapServer
from rtap_training.evaluation.measurement import measure
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import Outcome, Run, RunSpec
from rtap_training.evaluation.rules import SINGLE


@dataclass(frozen=True, slots=True)
class Session:
    """Settings shared by all runs. resume: reuse a stored run with the same questions and settings."""

    questions: Mapping[str, Sequence[Question]]
    load: Load
    check: Checker
    directory: Path
    resume: bool
    console: Console

    async def run_all(self, server: RtapServer, task: str, specs: Sequence[RunSpec]) -> list[Run]:
        """Run every rule on one task, one after the other so that wall-clock times are comparable."""
        return [await self._run(server, task, spec) for spec in specs]

    async def warm_up(self, server: RtapServer) -> None:
        """Send a few unmeasured requests. Raises ConfigError if the server answers none of them."""
        task, questions = next(iter(self.questions.items()))
        few = questions[: 2 * self.load.concurrency]
        run = await server.run(task, few, RunSpec(SINGLE), self.load, self.check, on_outcome=lambda _: None)
        if not run.answered:
            raise ConfigError(f"the server answered none of the first {len(few)} questions: {run.outcomes[0].error}")

    async def _run(self, server: RtapServer, task: str, spec: RunSpec) -> Run:
        path = self._path(server, task, spec)
        if self.resume and path.exists():
            run = Run.load(path)
            self.console.print(f"{task} · {spec.label}: taken from {path}")
            return run
        questions = self.questions[task]
        with self._progress() as progress:
            bar = progress.add_task(f"{task} · {spec.label}", total=len(questions), note="")
            seen: list[Outcome] = []

            def advance(outcome: Outcome) -> None:
                seen.append(outcome)
                progress.update(bar, advance=1, note=_note(seen))

            run = await server.run(task, questions, spec, self.load, self.check, on_outcome=advance)
        self._report(run)
        if len(run.answered) == len(run.outcomes):  # --resume repeats a run with failed requests
            run.save(path)
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
        self.console.print(
            f"{run.task} · {run.spec.label}: {accuracy.value:.3f} right [{accuracy.low:.3f}, {accuracy.high:.3f}], "
            f"{figures.policy_tokens.value:.1f} tokens a question, {run.wall_seconds or 0.0:.1f} s",
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
            "questions": [question.text for question in self.questions[task]],
            "load": asdict(self.load),
            "server": [server.model, server.config],
            "spec": asdict(spec),
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{task} {spec.label}").strip("-")
        return self.directory / "runs" / f"{slug}-{digest}.json"


def _note(outcomes: Sequence[Outcome]) -> str:
    errors = sum(outcome.error is not None for outcome in outcomes)
    right = sum(outcome.is_correct for outcome in outcomes)
    accuracy = f"{right / max(len(outcomes) - errors, 1):.2f} right"
    return f"{accuracy}, [bold red]{errors} failed[/]" if errors else accuracy
