"""``rtap train``: the training commands. Heavy imports are deferred so that ``--help`` is fast."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rtap_core.errors import ConfigError, RtapError, closest_match
from rtap_training.bundled import config as demo
from rtap_training.config.generator import GeneratorConfig
from rtap_training.config.rl import CONFIGS, Method
from rtap_training.config.settings import BUNDLED, add_flags, build_config
from rtap_training.config.sft import SftConfig

EVAL_COUNT = 600
RECIPE = Path("training/rtap_training/bundled/recipe.yaml")
# Module with ``run``, config, help text.
STAGES: dict[str, tuple[str, type[Any], str]] = {
    "sft": ("rtap_training.sft", SftConfig, "train a model on conversations, or on corrections of its samples"),
    "generator": (
        "rtap_training.generator",
        GeneratorConfig,
        "train a confidence generator for a model on your questions, or on kept samples",
    ),
    "demo-start": (
        "rtap_training.bundled.start",
        demo.StartConfig,
        "write an untrained model and training texts for the demo",
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rtap train", description="Train what rtap serves.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, kind, what) in STAGES.items():
        add_flags(commands.add_parser(name, help=what, allow_abbrev=False), kind)
    for name, kind in CONFIGS.items():
        parser_of = commands.add_parser(name, help=(kind.__doc__ or "").splitlines()[0], allow_abbrev=False)
        add_flags(parser_of, kind, ("teacher",) if name in (Method.RLAD, Method.KDRL) else ())
    for name in ("sft", "generator", *CONFIGS):
        commands.choices[name].add_argument(
            "--estimate", type=int, nargs="?", const=0, metavar="RANKS", default=argparse.SUPPRESS,
            help="print the expected peak memory of a process and exit without loading anything; RANKS: processes that "
            "FSDP shards the policy over (default: as launched)",
        )  # fmt: skip
    study = commands.add_parser(
        "study", help="train and measure the runs of a suite over seeds, and tabulate them", allow_abbrev=False
    )
    study.add_argument("suite", type=Path, help="YAML file: title, seeds, baseline, common, runs, measure")
    study.add_argument("--output", type=Path, required=True, help="folder of results.json and results.md")
    pipeline = commands.add_parser(
        "pipeline", help="run a recipe; the default trains the bundled models from scratch", allow_abbrev=False
    )
    pipeline.add_argument("--recipe", type=Path, default=RECIPE, help="YAML file of stages (default: %(default)s)")
    pipeline.add_argument("--folder", type=Path, default=Path("runs/bundled"), help="outputs (default: %(default)s)")
    pipeline.add_argument("--smoke", action="store_true", help="run a few steps per stage to check the whole pipeline")
    pipeline.add_argument("--install", action="store_true", help="replace the bundled models with the results")
    pipeline.add_argument("--models", type=Path, default=BUNDLED, help="where to install (default: %(default)s)")
    questions = commands.add_parser("questions", help="write the held-out question files", allow_abbrev=False)
    questions.add_argument("--output", type=Path, default=BUNDLED / "eval", help="folder (default: %(default)s)")
    questions.add_argument("--count", type=int, default=EVAL_COUNT, help="questions a task (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    # Workers that spin between steps would slow down a server on the same machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = _parser()
    parsed, unknown = parser.parse_known_args(argv)
    flags: dict[str, Any] = vars(parsed)
    command = flags.pop("command")
    if unknown:
        kinds: dict[str, type[Any]] = {name: kind for name, (_, kind, _) in STAGES.items()} | dict(CONFIGS)
        known = [f"--{item.name.replace('_', '-')}" for item in fields(kinds[command])] if command in kinds else []
        hint = closest_match(unknown[0].partition("=")[0], known)
        parser.error(
            f"unknown arguments of {command}: {' '.join(unknown)}{hint}; `rtap train {command} --help` lists its flags"
        )
    try:
        _run(command, flags)
    except RtapError as error:
        sys.stderr.write(f"rtap train: {error}\n")
        return 2
    return 0


def _run(command: str, flags: dict[str, Any]) -> None:
    # TRL warns about vLLM versions it does not list; the version pinned in pyproject.toml was tested.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    match command:
        case "questions":
            from rtap_training.data.questions import write_held_out

            for path in write_held_out(flags["output"], flags["count"]):
                sys.stdout.write(f"{path}\n")
        case "study":
            from rtap_training import study

            study.run(flags["suite"], flags["output"], _train)
        case "pipeline":
            from rtap_training.bundled import pipeline

            models = flags["models"] if flags["install"] else None
            pipeline.run(flags["recipe"], flags["folder"], _train, is_smoke=flags["smoke"], install_into=models)
        case _ if "estimate" in flags:
            from rtap_training import estimate

            ranks: int = flags.pop("estimate")
            kind = STAGES[command][1] if command in STAGES else CONFIGS[command]
            estimate.run(build_config(kind, flags.pop("config", None), flags), ranks)
        case _:
            _train(command, flags)


def _train(command: str, flags: dict[str, Any]) -> None:
    """Run one training command; the flag ``config`` is a YAML file."""
    file: Path | None = flags.pop("config", None)
    if command in STAGES:
        module, kind, _ = STAGES[command]
        import_module(module).run(build_config(kind, file, flags))
    elif command in CONFIGS:
        config = build_config(CONFIGS[command], file, flags)
        from rtap_training.rl import command as rl

        rl.run(config)
    else:
        raise ConfigError(f"unknown training command {command!r}; choose from {', '.join([*STAGES, *CONFIGS])}")


if __name__ == "__main__":
    raise SystemExit(
        import_module("rtap_training.__main__").main()
    )  # functions of __main__ cannot be sent to other processes
