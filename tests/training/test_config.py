"""Config merging, and refusal of unknown keys and wrong types."""

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from rtap_core.errors import ConfigError
from rtap_training.__main__ import STAGES, main
from rtap_training.bundled.config import StartConfig
from rtap_training.config.generator import GeneratorConfig
from rtap_training.config.rl import CONFIGS
from rtap_training.config.settings import add_flags, build_config


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 7\nnum_layers: 3\n")
    config = build_config(StartConfig, file, {"seed": 8})
    assert (config.seed, config.num_layers, config.num_texts) == (8, 3, StartConfig().num_texts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sed: 7", r"unknown settings \['sed'\]"),
        ("seed: seven", "seed='seven' must be of type int"),
        ("seed: true", "must be of type int"),
        ("head_dim: 48", "head_dim=48"),
        ("num_kv_heads: 4", "multiple of num_kv_heads"),
        ("tasks: countdown=-1", "at least 0"),
        ("num_texts: 0", "num_texts=0 must be at least 1"),
        ("- seed", "name: value"),
        ("seed: [", "cannot read"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        build_config(StartConfig, file, {})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        build_config(StartConfig, tmp_path / "none.yaml", {})


def test_every_field_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, GeneratorConfig)
    flags = vars(parser.parse_args(["--output", "a/b", "--learning-rate", "0.1", "--seed", "3", "--bf16"]))
    assert flags == {"config": None, "output": Path("a/b"), "learning_rate": 0.1, "seed": 3, "bf16": True}


def test_errors_are_one_sentence_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generator", "--questions", "countdown", "--policy", str(tmp_path)]) == 2
    assert "not a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["demo-start", "--num-text=3"],
            "unknown arguments of demo-start: --num-text=3 (did you mean --num-texts?); `rtap train",
        ),
        (["rtap", "--zzz", "3"], "unknown arguments of rtap: --zzz 3; `rtap train rtap --help` lists its flags"),
        (
            ["questions", "--zzz"],
            "unknown arguments of questions: --zzz; `rtap train questions --help`",
        ),
    ],
)
def test_a_flag_that_is_written_wrong_says_where_to_look(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", [*(kind for _, kind, _ in STAGES.values()), *CONFIGS.values()])
def test_no_stage_writes_over_the_bundled_models_unless_told_to(kind: type[Any]) -> None:
    (output,) = (field.default for field in fields(kind) if field.name == "output")
    assert output.parts[0] == "runs"


def test_help_is_quick() -> None:
    started = perf_counter()
    done = subprocess.run([sys.executable, "-m", "rtap_training", "sft", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--samples-file" in done.stdout
    assert perf_counter() - started < 5  # about 0.1 s; importing torch would take longer on a busy machine


def test_question_files_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(["questions", "--output", str(tmp_path / name), "--count", "20"]) == 0
    names = {"arithmetic.jsonl", "countdown.jsonl", "knights.jsonl"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
