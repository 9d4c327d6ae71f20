"""Result files (JSON, CSV, Markdown) and terminal tables of an evaluation."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter
from rich import box
from rich.console import Console
from rich.table import Table

from rtap_training.evaluation.measurement import Judgement
from rtap_training.evaluation.page import number, to_html
from rtap_training.evaluation.plot import plot_png
from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.replay import ORDERS
from rtap_training.evaluation.results import Results, Row, TaskResults
from rtap_training.evaluation.statistics import Interval

Line = TypeVar("Line")

# (heading, cell) of each column.
ROW_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("rule", lambda r: r.label),
    ("", lambda r: "live" if r.is_live else "replayed"),
    ("n", lambda r: str(r.n)),
    ("accuracy [95 %]", lambda r: interval(r.accuracy)),
    ("minus majority's [95 %]", lambda r: interval(r.difference, sign=True)),
    ("samples", lambda r: number(r.samples, 2)),
    ("tokens", lambda r: number(r.tokens.value)),
    ("of majority's [95 %]", lambda r: interval(r.token_ratio)),
    ("with judged", lambda r: number(r.total_token_ratio, 3)),
    ("seconds, of vote's [95 %]", lambda r: interval(r.wall_ratio)),
    ("minus adaptive vote at equal tokens [95 %]", lambda r: interval(r.at_equal_tokens, sign=True)),
)
SHORT_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("rule", lambda r: f"live {r.label}" if r.is_live else r.label),
    ("right", lambda r: number(r.accuracy.value, 3)),
    ("to majority [95 %]", lambda r: interval(r.difference, sign=True, digits=2)),
    ("drawn", lambda r: number(r.samples, 1)),
    ("tokens", lambda r: number(r.tokens.value, 0)),
    ("share", lambda r: number(r.token_ratio and r.token_ratio.value, 2)),
)
QUALITY_COLUMNS: tuple[tuple[str, Callable[[Judgement], str]], ...] = (
    ("answers of", lambda j: j.rule),
    ("answers", lambda j: str(j.answers)),
    ("right", lambda j: number(j.share_right, 3)),
    ("AUROC within question [95 %]", lambda j: interval(j.within and j.within.auroc)),
    ("mixed questions", lambda j: str(j.within.mixed_questions if j.within else "–")),
    ("AUROC by pairs", lambda j: number(j.within and j.within.pair_auroc, 3)),
    ("AUROC global", lambda j: number(j.auroc, 3)),
    ("ECE", lambda j: number(j.ece, 3)),
    ("Brier", lambda j: number(j.brier, 3)),
    ("best of all [95 %]", lambda j: interval(j.best_of)),
    ("any right", lambda j: number(j.ceiling.value, 3)),
)


def interval(value: Interval | None, *, sign: bool = False, digits: int = 3) -> str:
    """Value and interval, e.g. ``0.512 [0.472, 0.552]``; the value alone if it has none, a dash for unknown ones."""
    if value is None:
        return "–"
    spec = f"{'+' if sign else ''}.{digits}f"
    ends = "" if value.low != value.low else f" [{value.low:{spec}}, {value.high:{spec}}]"
    return f"{value.value:{spec}}{ends}"


def write_results(results: Results, directory: Path) -> list[Path]:
    """Write results.{json,csv,md}, report.html and accuracy_vs_tokens.png into ``directory``, each atomically."""
    contents: dict[str, str | bytes] = {
        "results.json": TypeAdapter(Results).dump_json(results, indent=1),
        "results.csv": to_csv(results),
        "results.md": to_markdown(results),
        "report.html": to_html(results),
        "accuracy_vs_tokens.png": plot_png(results),
    }
    for name, content in contents.items():
        write_atomically(directory / name, content)
    return [directory / name for name in contents]


def show(results: Results) -> None:
    """Print the rules of each task, and the quality of its confidence."""
    console = Console()
    for task in results.tasks:
        table = Table(title=task.task, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for heading, _ in SHORT_COLUMNS:
            is_rule = heading == "rule"
            table.add_column(heading, justify="left" if is_rule else "right", no_wrap=is_rule)
        for row in task.rows:
            table.add_row(*(cell(row) for _, cell in SHORT_COLUMNS))
        console.print(table)
        if (found := task.judgement) is not None:
            line = (
                f"Confidence: AUROC {interval(found.within and found.within.auroc)} within a question, "
                f"{number(found.auroc, 3)} global; ECE {number(found.ece, 3)}, Brier {number(found.brier, 3)}."
            )
            console.print(line, highlight=False, markup=False)


def to_csv(results: Results) -> str:
    """One line per rule with raw numbers; an interval has three columns."""
    lines: list[dict[str, object]] = []
    for task in results.tasks:
        for row in task.rows:
            lines.append({"task": task.task})
            for field in fields(Row):
                value = getattr(row, field.name)
                ends = (value.value, value.low, value.high) if isinstance(value, Interval) else (value, None, None)
                names = (field.name, f"{field.name}_low", f"{field.name}_high")
                lines[-1] |= dict(zip(names if "Interval" in str(field.type) else names[:1], ends, strict=False))
    output = io.StringIO()
    writer = csv.DictWriter(output, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return output.getvalue()


def to_markdown(results: Results) -> str:
    """Full report: setup, then per task the tables."""
    setting = "\n".join(f"- {name}: `{value}`" for name, value in results.setting.items())
    parts = [
        "# Accuracy and cost of the stopping rules",
        "![accuracy against tokens](accuracy_vs_tokens.png)",
        "Intervals are 95 %: Wilson for accuracies of live rules, normal over questions for tokens and for accuracies "
        "of replayed rules (Wilson where no order matters), paired bootstrap over questions (seconds: over "
        "rounds) for differences and ratios. *Majority* is the plain majority of all samples. *Replayed* rules decide "
        f"on the kept samples of `vote`, in {ORDERS} random orders of each question's samples. `majority` counts "
        "answers, `weighted` sums confidences; `adaptive` and `cges` are the same with a threshold, drawn in waves. "
        "Tokens and cycles are means per question; *judged* and *generator tokens* are those that the generator read. "
        "*(chosen)*: the threshold chosen on the calibration half of the questions, on the other half. "
        "*by text*: texts are compared instead of the answers in them. Seconds are at the stated concurrency.",
        setting,
        *(_task_markdown(task) for task in results.tasks),
    ]
    return "\n\n".join(parts) + "\n"


def _task_markdown(task: TaskResults) -> str:
    failed = [(m.spec.label, *one) for m in task.measurements for one in m.error_messages.items()]
    parts = [f"## {task.task}", _table(ROW_COLUMNS, task.rows)]
    if failed:
        parts.append("\n".join(f"- `{rule}`, {count} failed: {text}" for rule, text, count in failed))
    if task.measurements:
        headings = [name.replace("_", " ") for name in ("rule", *task.measurements[0].costs, "failed")]
        rows = [[m.spec.label, *map(number, m.costs.values()), str(m.errors)] for m in task.measurements]
        parts += ["### Live runs", grid(headings, rows)]
    if task.judgement is not None:
        parts += ["### Quality of the confidence", _table(QUALITY_COLUMNS, [task.judgement])]
    return "\n\n".join(parts)


def _table(columns: Sequence[tuple[str, Callable[[Line], str]]], lines: Sequence[Line]) -> str:
    return grid([heading for heading, _ in columns], [[cell(line) for _, cell in columns] for line in lines])


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table."""
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
