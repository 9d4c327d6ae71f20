"""Comparison of training runs over seeds (``rtap train study``): train, evaluate on held-out questions, tabulate.

A suite is a YAML file with common settings, named runs and seeds. Finished runs are kept, so a stopped study resumes.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from time import monotonic
from typing import Any, cast

import yaml
from scipy import stats  # pyright: ignore[reportMissingTypeStubs] - comes with scikit-learn

from rtap_core.errors import ConfigError
from rtap_training.bundled.pipeline import Run
from rtap_training.checkpoint import git_commit, versions
from rtap_training.questions import held_out_questions
from rtap_training.tasks import TASKS

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Suite:
    """A study as its YAML file describes it.

    runs: settings by name; ``method`` names the training command, and a run without it is the untrained policy.
    common: settings of all runs. baseline: the run that the others are compared with, paired by seed. measure: fields
    of ``rtap_training.rl.measure.MeasureConfig``, plus ``tasks``, ``questions`` (per task) and ``confidence``
    (generator of runs that do not train one).
    """

    title: str
    seeds: tuple[int, ...]
    baseline: str
    common: Mapping[str, Any]
    runs: Mapping[str, Mapping[str, Any]]
    measure: Mapping[str, Any]

    def run(self, name: str) -> tuple[str | None, dict[str, Any]]:
        """(training command or None, settings) of a run."""
        settings = {**self.common, **self.runs[name]}
        return settings.pop("method", None), settings


def load_suite(file: Path) -> Suite:
    """Read a suite. Raises ConfigError for an unreadable file, and for unknown or missing keys."""
    try:
        loaded: Any = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    names = {f.name for f in fields(Suite)}
    if not isinstance(loaded, dict) or set(cast(dict[str, Any], loaded)) != names:
        raise ConfigError(f"{file} must have exactly the keys {sorted(names)}")
    values: dict[str, Any] = {**cast(dict[str, Any], loaded)}
    values |= {"seeds": tuple(values["seeds"]), "runs": {name: own or {} for name, own in values["runs"].items()}}
    suite = Suite(**values)
    if suite.baseline not in suite.runs:
        raise ConfigError(f"{file}: baseline {suite.baseline!r} is not one of the runs {sorted(suite.runs)}")
    return suite


def run(file: Path, output: Path, run_command: Run) -> None:
    """Run the unfinished part of the suite, then write ``results.json`` and ``results.md`` into ``output``."""
    suite = load_suite(file)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results: dict[str, dict[str, Figures]] = json.loads(path.read_text("utf-8"))["figures"] if path.exists() else {}
    for seed in suite.seeds:
        for name in suite.runs:
            if str(seed) in results.get(name, {}):
                continue
            sys.stderr.write(f"study: {name}, seed {seed}\n")
            started = monotonic()
            figures = _train_and_measure(suite, name, seed, Path("runs") / output.name / f"{name}-{seed}", run_command)
            results.setdefault(name, {})[str(seed)] = figures | {"seconds": round(monotonic() - started, 1)}
            record = {"command": f"rtap train study {file} --output {output}", "figures": results,
                      "versions": versions(), "git_commit": git_commit()}  # fmt: skip
            partial = output / ".results.json.partial"
            partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            partial.replace(path)
    (output / "results.md").write_text(render(suite, results, command=f"rtap train study {file} --output {output}"))


def _train_and_measure(suite: Suite, name: str, seed: int, folder: Path, run_command: Run) -> Figures:
    method, settings = suite.run(name)
    if method is None:
        return _measure(suite, settings, Path(settings["policy"]), None, seed)
    run_command(method, settings | {"seed": seed, "output": str(folder)})
    own_generator = folder.with_name(f"{folder.name}-confidence")  # where RL saves the generator it updates
    return _measure(suite, settings, folder, own_generator if own_generator.is_dir() else None, seed)


def _measure(
    suite: Suite, run_settings: Mapping[str, Any], policy: Path, own_generator: Path | None, seed: int
) -> Figures:
    import torch

    from rtap_training.config import template_kwargs
    from rtap_training.rl.loading import load_for_training
    from rtap_training.rl.measure import MeasureConfig, measure
    from rtap_training.rl.online_generator import load_online_generator

    settings = dict(suite.measure)
    tasks, count, common = settings.pop("tasks"), settings.pop("questions"), settings.pop("confidence", None)
    loaded = load_for_training(policy, template_kwargs(run_settings.get("chat_template_kwargs", "{}")))
    path = own_generator or (None if common is None else Path(common))
    generator = None if path is None else load_online_generator(path)
    torch.set_num_threads(1)
    figures: Figures = {}
    for task in tasks:
        questions = held_out_questions(TASKS[task], count)
        found = measure(loaded.model, loaded.dialect, generator, questions,
                        MeasureConfig(**settings, seed=seed))  # fmt: skip
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
    keys = list(dict.fromkeys(k for name in runs for figures in results[name].values() for k in figures))
    lines = [f"# {suite.title}", "", f"{datetime.now(UTC):%Y-%m-%d}, seeds {list(suite.seeds)}, `{command}`", "",
             "Mean over seeds ± half-width of its 95 % Student interval.", "",
             f"| figure | {' | '.join(runs)} |", f"|---|{'---|' * len(runs)}",
             f"| seeds done | {' | '.join(str(len(results[name])) for name in runs)} |"]  # fmt: skip
    for key in keys:
        lines.append(f"| {key} | {' | '.join(_cell(results[name], key) for name in runs)} |")
    lines += ["", f"Difference from `{suite.baseline}`, paired by seed:", "",
              f"| figure | {' | '.join(n for n in runs if n != suite.baseline)} |",
              f"|---|{'---|' * (len(runs) - 1)}"]  # fmt: skip
    for key in keys:
        cells = [_difference(results[n], results[suite.baseline], key) for n in runs if n != suite.baseline]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(by_seed: Mapping[str, Figures], key: str) -> str:
    values = [v for figures in by_seed.values() if (v := figures.get(key)) is not None]
    return _number(*interval(values)) if values else "–"


def _difference(by_seed: Mapping[str, Figures], baseline: Mapping[str, Figures], key: str) -> str:
    pairs = [(by_seed[seed].get(key), baseline[seed].get(key)) for seed in by_seed if seed in baseline]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    return _number(*interval(values), sign="+") if values else "–"


def _number(mean: float, half_width: float, sign: str = "") -> str:
    digits = 3 if abs(mean) < 10 else 1
    tail = "" if half_width == float("inf") else f" ± {half_width:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{tail}"
