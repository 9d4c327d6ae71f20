"""Smoke run of the bundled recipe: every stage with a few steps, up to loadable models."""

import json
import math
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rtap_training.__main__ import main
from rtap_training.events import MAX_ROWS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = 300
BYTES = 16_000_000
STAGES = {
    "sft": (), "student-sft": (), "judge": ("countdown", "arithmetic"), "rtap": (), "student": (),
    "correct": (), "confidence": ("countdown", "arithmetic"),
}  # fmt: skip
WRITTEN = ("first_right", "right", "cycles", "tokens", "oops_per_1000_tokens")
RL = (
    "completions/mean_length", "clip_ratio/region_mean", "kl_old", "cycles/mean", "cycles/right",
    "oops/per_1000_tokens", "reward",
)  # fmt: skip
REWARDS = [f"rewards/{name}/mean" for name in ("increase", "final", "format", "answer", "length")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """(folder of the installed models, seconds of the run)"""
    folder = tmp_path_factory.mktemp("chain")
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipe names bundled models by their path in the checkout
        status = main(["pipeline", "--smoke", "--folder", str(folder / "out"), "--install",
                       "--models", str(folder / "models")])  # fmt: skip
    assert status == 0
    return folder / "models", time.monotonic() - started


def test_the_pipeline_takes_less_than_five_minutes(installed: tuple[Path, float]) -> None:
    assert installed[1] < SECONDS


def test_everything_together_is_small(installed: tuple[Path, float]) -> None:
    assert sum(file.stat().st_size for file in installed[0].rglob("*") if file.is_file()) < BYTES


@pytest.mark.parametrize("name", ["policy", "student", "confidence"])
def test_what_comes_out_loads_and_shares_its_tokens(installed: tuple[Path, float], name: str) -> None:
    folder = installed[0] / name
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForSequenceClassification if name == "confidence" else AutoModelForCausalLM
    assert kind.from_pretrained(folder).num_parameters() > 100_000
    assert config.rtap["format"] == "rtap"
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(installed[0] / "policy").get_vocab()
    )
    assert json.loads((folder / "manifest.json").read_text())["command"].startswith("rtap train ")


def test_the_student_is_a_quarter_of_its_teacher(installed: tuple[Path, float]) -> None:
    policy, student = (
        AutoModelForCausalLM.from_pretrained(installed[0] / name).num_parameters() for name in ("policy", "student")
    )
    assert policy / student > 4


def events_of(installed: tuple[Path, float], stage: str) -> EventAccumulator:
    """TensorBoard events of a stage."""
    accumulator = EventAccumulator(str(installed[0].parent / "out" / f"{stage}.run" / "tensorboard"))
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_writes_tensorboard_events(installed: tuple[Path, float], stage: str) -> None:
    events = events_of(installed, stage)
    scalars = set(events.Tags()["scalars"])
    if stage in ("rtap", "student"):
        wanted = {f"train/{name}" for name in (*RL, "loss")}
        wanted |= {f"train/{name}" for name in (*REWARDS, "confidence/ece", "confidence/brier", "generator/loss")
                   if stage == "rtap"}  # fmt: skip
        wanted |= {f"train/{name}" for name in ("rewards/answer/mean", "teacher/log_ratio") if stage == "student"}
        tables = ["samples/text_summary"]
    elif stage in ("sft", "student-sft", "correct"):
        wanted, tables = {"train/loss", "train/num_tokens", "train/mean_token_accuracy"}, []
    else:
        wanted = {"train/loss", "held_out/confidence/ece"} | {f"held_out/{name}" for name in WRITTEN}
        record = json.loads((installed[0].parent / "out" / stage / "manifest.json").read_text())
        assert set(record["figures"]["held_out"]) == {*STAGES[stage], "all"}
        tables = ["samples/text_summary"]
    assert wanted - scalars == set()
    for table in tables:
        text = events.Tensors(table)[-1].tensor_proto.string_val[0].decode()
        header, rule, *rows = text.splitlines()
        assert (header.count("|"), rule) == (7, "|---|---|---|---|---|---|")
        assert 1 <= len(rows) <= MAX_ROWS
        assert all(row.startswith(("| yes |", "| no |")) for row in rows)
        assert "<" not in text
        assert stage == "student" or "&lt;think&gt;" in text  # two steps from random weights write no tags
    assert all(math.isfinite(event.value) for tag in scalars for event in events.Scalars(tag))
