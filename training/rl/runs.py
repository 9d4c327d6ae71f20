"""The files of a run beside its checkpoints: a JSON-lines log, and what a run must agree on with its checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from server.rtap.errors import ConfigError
from training.checkpoint import git_commit, versions
from training.rl.config import SAME_RUN, RlConfig

COMPLETE_FILE = "complete.json"
"""Written last into a checkpoint; one without it is not used."""


def describe(config: RlConfig) -> str:
    """What made a checkpoint, as JSON: config, versions, commit."""
    return json.dumps({"config": _plain(config), "versions": versions(), "git_commit": git_commit()}, indent=2) + "\n"


def check_same_run(checkpoint: Path, config: RlConfig) -> None:
    """Raises ConfigError when ``checkpoint`` was made under settings that would make it another run."""
    earlier: dict[str, Any] = json.loads((checkpoint / COMPLETE_FILE).read_text("utf-8"))["config"]
    now = _plain(config)
    differing = [f"{name}: {earlier.get(name)!r} then, {now[name]!r} now" for name in SAME_RUN
                 if earlier.get(name) != now[name]]  # fmt: skip
    if differing:
        raise ConfigError(
            f"{checkpoint} is of a run with other settings ({'; '.join(differing)}); "
            f"give them again, name another output, or remove {checkpoint.parent}"
        )


def _plain(config: RlConfig) -> dict[str, Any]:
    return {"method": config.method} | {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [p.parent for p in run_dir.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    return max(whole, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


class JsonLog(TrainerCallback):
    """One JSON line for each log event. A resumed run drops the lines of updates that it will repeat."""

    def __init__(self, path: Path, *, resumed_at: int, is_writer: bool) -> None:
        self.last: dict[str, Any] = {}
        self._path = path if is_writer else None
        if is_writer:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(line for line in kept if _is_kept(line, resumed_at)), "utf-8")
            partial.replace(path)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append; ``last`` keeps the newest figures for the manifest."""
        del args, control, kwargs
        figures = {"step": state.global_step} | cast(dict[str, Any], logs or {})
        if "loss" in figures:
            self.last = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")


def _is_kept(line: str, resumed_at: int) -> bool:
    """Whole lines of updates up to the checkpoint; a kill may have cut the last one."""
    try:
        return int(json.loads(line)["step"]) <= resumed_at
    except (ValueError, KeyError):
        return False
