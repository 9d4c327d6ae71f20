"""The whole chain of the bundled recipe in a few steps a stage: from nothing to models that the server can load."""

import json
import time
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from training.__main__ import main

ROOT = Path(__file__).parents[2]
SECONDS = 300
BYTES = 16_000_000


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder that the models were installed into, and the seconds that took."""
    folder = tmp_path_factory.mktemp("chain")
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipe names bundled models by their path in the checkout
        status = main(["pipeline", "--smoke", "--folder", str(folder / "out"), "--install",
                       "--models", str(folder / "models")])  # fmt: skip
    assert status == 0
    return folder / "models", time.monotonic() - started


def test_the_chain_takes_less_than_five_minutes(installed: tuple[Path, float]) -> None:
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
