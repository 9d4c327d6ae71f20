"""The wheel, built from this checkout and imported from another folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the dev extra's hatchling: no network, no isolated environment."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("rtap-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as an installation would have them."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_has_four_packages_their_data_and_the_demo_models(unpacked: Path) -> None:
    tops = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"rtap_core", "rtap_server", "rtap_training", "rtap_client"}
    for name in (
        "rtap_core/oops.txt", "rtap_server/routes/page/index.html", "rtap_training/evaluation/page.html.j2",
        "rtap_core/models/policy/config.json", "rtap_core/models/policy/model.safetensors",
        "rtap_core/models/confidence/model.safetensors", "rtap_core/models/eval/countdown.jsonl",
    ):  # fmt: skip
        assert (unpacked / name).stat().st_size > 0, name
    assert not [path for path in unpacked.rglob("*") if path.suffix in (".pth", ".pyc")]


def test_every_module_of_the_checkout_is_in_the_wheel(unpacked: Path) -> None:
    sources = (ROOT / "server", ROOT / "training", ROOT / "clients" / "python")
    expected = {path.relative_to(source) for source in sources for path in source.rglob("*.py")}
    assert len(expected) > 80
    assert not [path for path in expected if not (unpacked / path).is_file()]


def test_an_installation_finds_its_models_without_a_checkout(unpacked: Path, tmp_path: Path) -> None:
    code = """
import json
import rtap_client.cli, rtap_core
from rtap_core.artifact import BUNDLED_MODELS
policy = json.loads((BUNDLED_MODELS / "policy" / "config.json").read_text())
print(json.dumps([rtap_client.__file__, rtap_core.__file__, str(BUNDLED_MODELS), policy["architectures"][0]]))
"""
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *paths, architecture = json.loads(done.stdout)
    assert paths == [
        str(unpacked / name) for name in ("rtap_client/__init__.py", "rtap_core/__init__.py", "rtap_core/models")
    ]
    assert architecture.endswith("ForCausalLM")


def test_an_editable_installation_copies_nothing(tmp_path: Path) -> None:
    """A copy of the models would be older than the checkout's after the next training."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel:editable", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = tmp_path.glob("rtap-*.whl")
    names = zipfile.ZipFile(built).namelist()
    assert [name for name in names if ".dist-info/" not in name] == ["_rtap.pth"]
