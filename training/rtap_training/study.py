"""Comparison of training runs over seeds (``rtap train study``): train, evaluate on held-out questions, tabulate.

A suite is a YAML file with common settings, named runs and seeds. Finished runs are kept, so a stopped study resumes.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from time import monotonic
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy import stats  # pyright: ignore[reportMissingTypeStubs] - comes with scikit-learn

from rtap_core.errors import ConfigError
from rtap_training.bundled.pipeline import Run
from rtap_training.checkpoint import git_commit, versions
from rtap_training.data.questions import held_out_questions
from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.report import grid
from rtap_training.tasks import TASKS

Figures = dict[str, float | None]


class Suite(BaseModel):
    """A study as its YAML file describes it.

    runs: settings by name; ``method`` names the training command, and a run without it is the untrained policy.
    common: settings of all runs. baseline: the run that the others are compared with, paired by seed. measure: fields
    of ``rtap_training.rl.measure.MeasureConfig``, plus ``tasks``, ``questions`` (per task) and ``confidence``
    (generator of runs that do not train one).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    seeds: tuple[int, ...]
    baseline: str
    common: dict[str, Any]
    runs: dict[str, dict[str, Any] | None]
    measure: dict[str, Any]

    def run(self, name: str) -> tuple[str | None, dict[str, Any]]:
        """(training command or None, settings) of a run."""
        settings = self.common | (self.runs[name] or {})
        return settings.pop("method", None), settings


def load_suite(file: Path) -> Suite:
    """Read a suite. Raises ConfigError for an unreadable file, and for unknown or missing keys."""
    try:
        suite = Suite.model_validate(yaml.safe_load(file.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if suite.baseline not in suite.runs:
        raise ConfigError(f"{file}: baseline {suite.baseline!r} is not one of the runs {sorted(suite.runs)}")
    return suite


def run(file: Path, output: Path, run_command: Run) -> None:
    """Run the unfinished part of the suite, then write ``results.json`` and ``results.md`` into ``output``."""
    suite, path, command = load_suite(file), output / "results.json", f"rtap train study {file} --output {output}"
    results: dict[str, dict[str, Figures]] = json.loads(path.read_text("utf-8"))["figures"] if path.exists() else {}
    for seed in suite.seeds:
        for name in suite.runs:
            if str(seed) in results.get(name, {}):
                continue
            sys.stderr.write(f"study: {name}, seed {seed}\n")
            started = monotonic()
            figures = _train_and_measure(suite, name, seed, Path("runs") / output.name / f"{name}-{seed}", run_command)
            results.setdefault(name, {})[str(seed)] = figures | {"seconds": round(monotonic() - started, 1)}
            record = {"command": command, "figures": results, "versions": versions(), "git_commit": git_commit()}
            write_atomically(path, json.dumps(record, indent=1) + "\n")
    write_atomically(output / "results.md", render(suite, results, command=command))


def _train_and_measure(suite: Suite, name: str, seed: int, folder: Path, run_command: Run) -> Figures:
    import torch

    from rtap_training.config.settings import template_kwargs
    from rtap_training.models.loading import load_for_training
    from rtap_training.models.online_generator import load_online_generator
    from rtap_training.rl.measure import MeasureConfig, measure

    method, changed = suite.run(name)
    settings = dict(suite.measure)
    tasks, count, common = settings.pop("tasks"), settings.pop("questions"), settings.pop("confidence", None)
    policy, judge = Path(changed["policy"]), None if common is None else Path(common)
    if method is not None:
        run_command(method, changed | {"seed": seed, "output": str(folder)})
        policy, own = folder, folder.with_name(f"{folder.name}-confidence")  # where RL saves the generator it updates
        judge = own if own.is_dir() else judge
    loaded = load_for_training(policy, template_kwargs(changed.get("chat_template_kwargs", "{}")))
    generator = None if judge is None else load_online_generator(judge)
    torch.set_num_threads(1)
    config = MeasureConfig(**settings, seed=seed)
    figures: Figures = {}
    for task in tasks:
        questions = held_out_questions(TASKS[task], count)
        found = measure(loaded.model, loaded.dialect, generator, questions, config)
        figures |= {f"{task}/{key}": None if value is None else round(value, 5) for key, value in found.items()}
    return figures


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % Student interval over seeds; infinite for a single value."""
    if len(values) < 2:
        return fmean(values), float("inf")
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return fmean(values), quantile * stdev(values) / len(values) ** 0.5


def render(suite: Suite, results: Mapping[str, Mapping[str, Figures]], *, command: str) -> str:
    """Markdown tables: mean and interval over seeds, and the difference from the baseline paired by seed."""
    runs = [name for name in suite.runs if results.get(name)]
    others = [name for name in runs if name != suite.baseline]
    keys = list(dict.fromkeys(k for name in runs for figures in results[name].values() for k in figures))

    def difference(name: str, key: str) -> str:
        base = results[suite.baseline]
        pairs = [(own.get(key), base[seed].get(key)) for seed, own in results[name].items() if seed in base]
        return _cell([a - b for a, b in pairs if a is not None and b is not None], sign="+")

    def mean(name: str, key: str) -> str:
        return _cell([value for one in results[name].values() if (value := one.get(key)) is not None])

    parts = [
        f"# {suite.title}",
        f"{datetime.now(UTC):%Y-%m-%d}, seeds {list(suite.seeds)}, `{command}`",
        "Mean over seeds ± half-width of its 95 % Student interval.",
        grid(
            ["figure", *runs],
            [["seeds done", *(str(len(results[n])) for n in runs)], *([k, *(mean(n, k) for n in runs)] for k in keys)],
        ),
        f"Difference from `{suite.baseline}`, paired by seed:",
        grid(["figure", *others], [[key, *(difference(name, key) for name in others)] for key in keys]),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "–"
    mean, half_width = interval(values)
    digits = 3 if abs(mean) < 10 else 1
    tail = "" if half_width == float("inf") else f" ± {half_width:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{tail}"
