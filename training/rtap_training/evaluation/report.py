"""Result files (JSON, CSV, Markdown) and terminal tables of an evaluation."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import TypeVar, cast

from rich import box
from rich.console import Console
from rich.table import Table

from rtap_training.evaluation.comparison import EqualTokens, Versus, VoteComparison
from rtap_training.evaluation.measurement import ConfidenceQuality, Measurement
from rtap_training.evaluation.page import to_html
from rtap_training.evaluation.plot import plot_png
from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.results import Results, TaskResults
from rtap_training.evaluation.statistics import Interval

Row = TypeVar("Row")

# (heading, cell) of each column; two tables per task, so that each fits a terminal.
COST_COLUMNS: tuple[tuple[str, Callable[[Measurement], str]], ...] = (
    ("rule", lambda m: m.spec.label),
    ("n", lambda m: str(m.n)),
    ("accuracy [95 %]", lambda m: interval(m.accuracy)),
    ("policy tokens", lambda m: number(m.policy_tokens.value)),
    ("judged tokens", lambda m: number(m.generator_tokens)),
    ("wall s", lambda m: number(m.wall_seconds)),
    ("per s", lambda m: number(m.questions_per_second)),
    ("failed", lambda m: str(m.errors)),
)
RECURSION_COLUMNS: tuple[tuple[str, Callable[[Measurement], str]], ...] = (
    ("rule", lambda m: m.spec.label),
    ("cycles", lambda m: number(m.cycles, 2)),
    ("Oops tokens", lambda m: number(m.oops_tokens, 2)),
    ("per 1,000", lambda m: number(m.oops_per_1000_tokens, 2)),
    ("prompt cached", lambda m: number(m.cached_prompt_tokens)),
    ("re- computed", lambda m: number(m.recomputed_prompt_tokens)),
    ("per later cycle (max)", lambda m: _later(m)),
    ("no answer", lambda m: str(m.unanswered)),
    ("degraded", lambda m: str(m.degraded)),
)
QUALITY_COLUMNS: tuple[tuple[str, Callable[[ConfidenceQuality], str]], ...] = (
    ("confidence of", lambda q: q.source),
    ("answers", lambda q: str(q.scored_answers)),
    ("right", lambda q: number(q.share_right, 3)),
    ("AUROC within question [95 %]", lambda q: interval(q.within.auroc) if q.within else "–"),
    ("mixed questions", lambda q: str(q.within.mixed_questions) if q.within else "0"),
    ("AUROC by pairs", lambda q: number(q.within.pair_auroc, 3) if q.within else "–"),
    ("AUROC global", lambda q: number(q.auroc, 3)),
    ("ECE", lambda q: number(q.ece, 3)),
    ("Brier", lambda q: number(q.brier, 3)),
    ("best of all [95 %]", lambda q: interval(q.best_of)),
    ("any right", lambda q: number(q.ceiling.value, 3)),
)
VERSUS_COLUMNS: tuple[tuple[str, Callable[[tuple[str, Versus]], str]], ...] = (
    ("questions", lambda row: f"{row[0]} ({row[1].n})"),
    ("confidence [95 %]", lambda row: interval(row[1].accuracy)),
    ("vote [95 %]", lambda row: interval(row[1].vote_accuracy)),
    ("difference [95 %]", lambda row: interval(row[1].difference, sign=True)),
    ("token ratio", lambda row: number(row[1].token_ratio, 3)),
    ("with generator's tokens", lambda row: number(row[1].total_token_ratio, 3)),
)
EQUAL_COLUMNS: tuple[tuple[str, Callable[[EqualTokens], str]], ...] = (
    ("logprob threshold", lambda e: f"{e.threshold:.4g}" + (" (chosen, reporting half)" if e.is_chosen else "")),
    ("n", lambda e: str(e.n)),
    ("tokens", lambda e: number(e.tokens)),
    ("logprob accuracy", lambda e: number(e.accuracy, 3)),
    ("confidence at equal tokens", lambda e: number(e.curve_accuracy, 3)),
    ("difference [95 %]", lambda e: _difference(e.difference)),
    ("difference with judged tokens counted [95 %]", lambda e: _difference(e.total_difference)),
)


def number(value: float | None, digits: int = 1) -> str:
    """Fixed decimals; a dash for unknown values."""
    return "–" if value is None or value != value else f"{value:,.{digits}f}"


def interval(value: Interval, *, sign: bool = False) -> str:
    """Value and interval with three decimals, e.g. ``0.512 [0.472, 0.552]``."""
    spec = "+.3f" if sign else ".3f"
    return f"{value.value:{spec}} [{value.low:{spec}}, {value.high:{spec}}]"


def write_results(results: Results, directory: Path) -> list[Path]:
    """Write results.{json,csv,md}, report.html and accuracy_vs_tokens.png into ``directory``, each atomically."""
    contents: dict[str, str | bytes] = {
        "results.json": json.dumps(results.as_json(), indent=1, allow_nan=False) + "\n",
        "results.csv": to_csv(results),
        "results.md": to_markdown(results),
        "report.html": to_html(results),
        "accuracy_vs_tokens.png": plot_png(results),
    }
    for name, content in contents.items():
        write_atomically(directory / name, content)
    return [directory / name for name in contents]


def show(results: Results, console: Console) -> None:
    """Print the tables of each task, then the comparisons."""
    for task in results.tasks:
        for title, columns in ((f"{task.task}: accuracy and cost", COST_COLUMNS), ("recursion", RECURSION_COLUMNS)):
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            for heading, _ in columns:
                is_rule = heading == "rule"
                table.add_column(heading, justify="left" if is_rule else "right", no_wrap=is_rule)
            for row in task.measurements:
                table.add_row(*(cell(row) for _, cell in columns))
            console.print(table)
        sentences = [*map(_quality_sentence, task.quality), *map(_vote_sentence, task.versus_vote)]
        sentences += [_equal_sentence(task.versus_logprob)] if task.versus_logprob else []
        for sentence in sentences:
            console.print(sentence, highlight=False, markup=False)


def to_csv(results: Results) -> str:
    """One row per run with raw numbers."""
    rows = [_flat(m) for task in results.tasks for m in task.measurements]
    output = io.StringIO()
    writer = csv.DictWriter(output, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()


def _flat(m: Measurement) -> dict[str, object]:
    """Values of one run by column name; interval bounds become separate columns."""
    row: dict[str, object] = {"task": m.task, "label": m.spec.label}
    fields: dict[str, object] = {
        **asdict(m.spec),
        **{field.name: getattr(m, field.name) for field in dataclass_fields(m)},
    }
    for name, value in fields.items():
        if isinstance(value, Interval):
            row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        elif isinstance(value, Mapping):
            row[name] = "; ".join(f"{reason}: {count}" for reason, count in cast(Mapping[str, int], value).items())
        elif name != "spec":
            row[name] = value
    return row


def to_markdown(results: Results) -> str:
    """Full report: setup, then per task the tables, the confidence and both comparisons."""
    setting = "\n".join(f"- {name}: `{value}`" for name, value in results.setting.items())
    parts = [
        "# Accuracy and cost of the stopping rules",
        "![accuracy against tokens](accuracy_vs_tokens.png)",
        "Intervals are 95 %: Wilson for accuracies, paired bootstrap over questions for differences. Tokens, cycles, "
        "Oops tokens and prompt tokens are means per question; *judged tokens* are those that the generator read. "
        "`majority xN` is recomputed from the first N samples of `vote`, whose own answer may be weighted by "
        "confidence; `vote xN plain` ran on the server without a generator. *per s*: questions per second at the "
        "stated concurrency.",
        setting,
        *(_task_markdown(task) for task in results.tasks),
    ]
    return "\n\n".join(parts) + "\n"


def _task_markdown(task: TaskResults) -> str:
    parts = [f"## {task.task}", _grid(COST_COLUMNS, task.measurements)]
    errors = [
        f"- `{m.spec.label}`, {count} failed: {text}"
        for m in task.measurements
        for text, count in m.error_messages.items()
    ]
    parts += ["\n".join(errors)] if errors else []
    parts += ["### Recursion", _grid(RECURSION_COLUMNS, task.measurements)]
    if task.quality:
        parts += ["### Quality of the confidence", _grid(QUALITY_COLUMNS, task.quality)]
    for comparison in task.versus_vote:
        rows = [("reporting half", comparison.reported), ("all", comparison.all_questions)]
        parts += [f"### Against `{comparison.vote}`", _vote_sentence(comparison), _grid(VERSUS_COLUMNS, rows)]
    if task.versus_logprob:
        parts += [
            "### Against the logprob rule at equal tokens",
            _equal_sentence(task.versus_logprob),
            _grid(EQUAL_COLUMNS, task.versus_logprob),
        ]
    return "\n\n".join(parts)


def _grid(columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(heading for heading, _ in columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows)])


def _later(m: Measurement) -> str:
    return "–" if m.later_recomputed_mean is None else f"{m.later_recomputed_mean:.1f} ({m.later_recomputed_max})"


def _difference(value: Interval | None) -> str:
    return "beyond the curve" if value is None else interval(value, sign=True)


def _equal_sentence(rows: Sequence[EqualTokens]) -> str:
    chosen = rows[0]
    return (
        f"Against the logprob rule (threshold {chosen.threshold:.4g}, chosen the same way) at its {chosen.tokens:.1f} "
        f"tokens on {chosen.n} questions: accuracy {_difference(chosen.difference)}; "
        f"{_difference(chosen.total_difference)} with judged tokens counted."
    )


def _quality_sentence(quality: ConfidenceQuality) -> str:
    within = interval(quality.within.auroc) if quality.within else "unknown (no question has right and wrong answers)"
    return (
        f"Confidence of the {quality.source} rule: AUROC {within} within a question, {number(quality.auroc, 3)} "
        f"global; ECE {number(quality.ece, 3)}, Brier {number(quality.brier, 3)}."
    )


def _vote_sentence(comparison: VoteComparison) -> str:
    reported, everything = comparison.reported, comparison.all_questions
    return (
        f"Threshold {comparison.threshold:.4g} (chosen on the other half, at most {comparison.budget:.0%} of the "
        f"vote's tokens) against {comparison.vote}: accuracy {interval(reported.difference, sign=True)} on "
        f"{reported.n} questions, {interval(everything.difference, sign=True)} on all {everything.n}; tokens x "
        f"{number(everything.token_ratio, 3)} ({number(everything.total_token_ratio, 3)} with what the generator "
        f"read); wall-clock x {number(comparison.wall_ratio, 3)} of a vote scored by the generator, x "
        f"{number(comparison.wall_ratio_plain, 3)} of one without."
    )
