"""The recipe "A Hugging Face model of your own", by its own commands: from a checkpoint of the `think` format to a
generator of its own, an exam through a real server with that generator, and a report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, Command, commands
from tests.other_checkpoints import save_think

pytestmark = pytest.mark.slow
STEPS = [c for c in commands(ROOT / "docs" / "training.md") if c.words[0] == "rtap"]
START = "from rtap_client.cli import main; raise SystemExit(main())"
# What makes the recipe small enough for a test, beside its own flags.
SERVER = ["--", "--enforce-eager", "--kv-cache-memory-bytes", str(2**29)]
SMALL = {
    "calibrate": ["--limit", "80", "--samples", "4", "--max-tokens", "100", *SERVER],
    "train": ["--epochs", "1", "--learning-rate", "3e-4"],
    "eval": ["--limit", "12", "--samples", "2", "--policies", "single,confidence,vote", "--max-cycles", "2", *SERVER],
}


def run(step: Command, folder: Path) -> str:
    name, *rest = step.words[1:]
    words = ["model" if word == "MODEL" else word for word in rest]
    done = subprocess.run(
        [sys.executable, "-c", START, name, *words, *SMALL[name]], cwd=folder, capture_output=True, text=True,
        timeout=400, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def step(*start: str) -> Command:
    return next(c for c in STEPS if c.words[: len(start)] == start)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_think("policy", folder / "model")
    rows = (ROOT / "deploy" / "models" / "eval" / "countdown.jsonl").read_text().splitlines()
    (folder / "questions.jsonl").write_text("\n".join(rows[:300]) + "\n")
    (folder / "exam.jsonl").write_text("\n".join(rows[300:400]) + "\n")
    run(step("rtap", "calibrate"), folder)
    run(step("rtap", "train", "generator"), folder)
    return folder


def test_the_generator_is_of_the_models_format_and_knows_its_threshold(folder: Path) -> None:
    block = json.loads((folder / "generator" / "config.json").read_text())["rtap"]
    assert (block["format"], block["kind"]) == ("think", "confidence")
    assert 0 < block["threshold"] < 1
    assert len(block["calibration"]["reference"]) == block["calibration"]["bins"] == 20
    assert json.loads((folder / "generator" / "manifest.json").read_text())["command"] == "rtap train generator"


def test_the_exam_is_sat_on_a_server_with_that_generator_and_its_report_is_one_page(folder: Path) -> None:
    shown = run(step("rtap", "eval"), folder)
    results = json.loads((folder / "exam" / "results.json").read_text())
    served = results["setting"]["server"]
    assert (served["format"], served["confidence"]["kind"]) == ("think", "pooling")
    rows = {m["spec"]["threshold"]: m for m in results["tasks"][0]["measurements"] if m["spec"]["rule"] == "confidence"}
    assert set(rows) == {0.3, 0.5, 0.7, 0.9}
    assert all((m["n"], m["errors"], m["degraded"]) == (12, 0, 0) for m in rows.values())
    assert "report.html" in shown
    page = (folder / "exam" / "report.html").read_text()
    assert "confidence@0.7" in page
    assert results["tasks"][0]["judgement"]["answers"] > 0
