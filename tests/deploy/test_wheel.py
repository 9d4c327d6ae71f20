"""The wheel that others would install, built from this checkout and imported elsewhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the hatchling of the dev extra: no network, no isolated environment."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("rtap-*.whl")
    return built


def test_the_wheel_holds_four_packages_and_the_demo_models(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"rtap_core", "rtap_server", "rtap_training", "rtap_client"}
    assert {
        "rtap_core/oops.txt",
        "rtap_core/format.py",
        "rtap_client/cli.py",
        "rtap_training/__init__.py",
        "rtap_core/models/policy/config.json",
    } <= names
    assert "rtap_training/evaluation/page.html.j2" in names
    assert not [name for name in names if name.endswith((".pth", ".pyc"))]


def test_every_module_of_the_checkout_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    roots = {
        ROOT / "server": ROOT / "server",
        ROOT / "training": ROOT / "training",
        ROOT / "clients/python/rtap_client": ROOT / "clients/python",
    }
    expected = {path.relative_to(base).as_posix() for root, base in roots.items() for path in root.rglob("*.py")}
    assert expected <= names


def test_the_client_imports_from_the_wheel_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    code = "import rtap_client.cli; print(rtap_client.__file__, rtap_client.__version__)"
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(str(wheel))
