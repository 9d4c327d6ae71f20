"""Decisions of the set-up scripts, on a real interpreter or a real pip."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setup_env
import setup_pip

PYTHON = Path(sys.executable)


def fake_package(folder: Path, name: str, code: str) -> dict[str, str]:
    """An environment in which `import name` runs this code."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


def wheel_folder(folder: Path, name: str) -> Path:
    """A folder with a wheel of this file name."""
    import zipfile

    distribution, version, *_ = name.split("-")
    with zipfile.ZipFile(folder / name, "w") as wheel:
        info = f"{distribution}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def only_this(folder: Path) -> dict[str, str]:
    """A pip configuration with this folder and no index."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return {**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


# ------------------------------------------------------------------------------------------------------ torchvision


def test_torchvision_of_another_torch_is_found_broken(tmp_path: Path) -> None:
    env = fake_package(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    assert setup_pip.torchvision_is_broken(PYTHON, env)


def test_torchvision_that_imports_stays(tmp_path: Path) -> None:
    env = fake_package(tmp_path, "torchvision", "ops = None")
    assert not setup_pip.torchvision_is_broken(PYTHON, env)
    assert not setup_pip.remove_broken_torchvision(PYTHON, env)


def test_absent_torchvision_is_not_broken(tmp_path: Path) -> None:
    no_site_packages = tmp_path / "python"
    no_site_packages.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    no_site_packages.chmod(0o755)
    assert not setup_pip.torchvision_is_broken(no_site_packages, os.environ)


def test_broken_torchvision_goes_with_both_its_companions(tmp_path: Path) -> None:
    """A fake interpreter: its import fails, and it records the pip command."""
    asked = tmp_path / "asked"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "$*" >> "{asked}"\n')
    python.chmod(0o755)
    assert setup_pip.remove_broken_torchvision(python, os.environ)
    assert asked.read_text() == "-m pip uninstall --yes --quiet torchvision torchaudio torchcodec\n"


# ----------------------------------------------------------------------------------------------------- torch's source


def test_torch_comes_from_pips_configuration_where_that_offers_the_cpu_build(tmp_path: Path) -> None:
    env = only_this(wheel_folder(tmp_path, "torch-99.1+cpu-py3-none-any.whl"))
    assert setup_pip.torch_source(PYTHON, {"cpu"}, "99.1", env) == []


def test_torch_comes_from_pytorchs_index_where_only_the_plain_build_is_offered(tmp_path: Path) -> None:
    env = only_this(wheel_folder(tmp_path, "torch-99.1-py3-none-any.whl"))
    assert setup_pip.torch_source(PYTHON, {"dev"}, "99.1", env) == ["--extra-index-url", setup_pip.CPU_WHEELS]


def test_cuda_machines_take_torch_from_pypi(tmp_path: Path) -> None:
    assert setup_pip.torch_source(PYTHON, {"cuda", "dev"}, "99.1", only_this(tmp_path)) == []


def test_the_torch_pin_is_the_one_of_the_cpu_extra() -> None:
    version = setup_env.torch_pin(setup_env.read_pyproject(setup_env.ROOT))
    assert version.count(".") == 2


# -------------------------------------------------------------------------------------------------------------- stamp


def test_only_what_an_install_depends_on_changes_the_key() -> None:
    pyproject = {"project": {"dependencies": ["httpx"]}, "tool": {"ruff": {"line-length": 120}}}
    key = setup_env.stamp_key(pyproject, b"script", "3.11", "lock")
    assert setup_env.stamp_key({**pyproject, "tool": {"ruff": {"line-length": 99}}}, b"script", "3.11", "lock") == key
    others = [
        setup_env.stamp_key({**pyproject, "project": {"dependencies": []}}, b"script", "3.11", "lock"),
        setup_env.stamp_key(pyproject, b"changed", "3.11", "lock"),
        setup_env.stamp_key(pyproject, b"script", "3.12", "lock"),
        setup_env.stamp_key(pyproject, b"script", "3.11", "another lock"),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize("content", [None, "", "{}", '{"key": "k"}', '{"key": "k", "extras": ["cpu"]}', "[]"])
def test_a_damaged_stamp_counts_as_none(tmp_path: Path, content: str | None) -> None:
    stamp = tmp_path / "stamp"
    if content is not None:
        stamp.write_text(content)
    assert setup_env.Stamp.read(stamp) == setup_env.Stamp()


@pytest.mark.parametrize(
    ("there", "wanted", "enough"),
    [
        (("k", {"cpu", "dev"}, False), ("k", {"cpu"}, False), True),
        (("k", {"cpu", "dev"}, True), ("k", {"cpu"}, False), True),
        (("k", {"cpu"}, False), ("k", {"cpu"}, True), False),
        (("k", {"cpu"}, True), ("k", {"cpu", "dev"}, True), False),
        (("old", {"cpu"}, True), ("k", {"cpu"}, True), False),
    ],
)
def test_an_environment_is_enough_if_it_has_the_extras_and_the_lock_where_asked_for(
    tmp_path: Path, there: tuple[str, set[str], bool], wanted: tuple[str, set[str], bool], enough: bool
) -> None:
    def stamp(key: str, extras: set[str], locked: bool) -> setup_env.Stamp:
        return setup_env.Stamp(key, frozenset(extras), locked)

    stamp(*there).write(tmp_path / "stamp")
    assert setup_env.Stamp.read(tmp_path / "stamp").has(stamp(*wanted)) is enough


def stamped(venv: Path, extras: set[str]) -> Path:
    """An environment with a stamp of these extras, and no interpreter."""
    venv.mkdir()
    pyproject = setup_env.read_pyproject(setup_env.ROOT)
    applies = setup_env.lock_applies(extras, platform.system(), platform.machine(), sys.version_info[:2])
    lock = setup_env.LOCK.read_text(encoding="utf-8") if applies else ""
    key = setup_env.stamp_key(pyproject, setup_env.own_scripts(), sys.version, lock)
    setup_env.Stamp(key, frozenset(extras)).write(venv / ".rtap-setup.json")
    return venv


def test_a_second_run_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    venv = stamped(tmp_path / "venv", {"cpu", "dev"})
    assert setup_env.main(["--venv", str(venv), "cpu"]) == 0
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in venv.iterdir()] == [".rtap-setup.json"]


def test_an_environment_for_cpu_is_not_turned_into_one_for_cuda(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = stamped(tmp_path / "venv", {"cpu"})
    assert setup_env.main(["--venv", str(venv), "cuda"]) == 1
    assert "was set up for cpu: run `make clean`" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- lock


def test_the_lock_is_for_one_kind_of_machine() -> None:
    assert setup_env.lock_applies({"cpu", "dev"}, "Linux", "x86_64", (3, 11))
    assert not setup_env.lock_applies({"cuda"}, "Linux", "x86_64", (3, 11))
    assert not setup_env.lock_applies({"cpu"}, "Linux", "aarch64", (3, 11))
    assert not setup_env.lock_applies({"cpu"}, "Linux", "x86_64", (3, 12))


def test_serving_takes_the_first_part_of_the_lock_and_tests_take_all() -> None:
    lock = f"# head\n\ntorch==2 --hash=sha256:aa\n\n{setup_env.FOR_TESTS}\npytest==9 --hash=sha256:bb\n"
    assert setup_env.locked_pins(lock, {"cpu"}) == ["torch==2 --hash=sha256:aa"]
    everything = ["torch==2 --hash=sha256:aa", "pytest==9 --hash=sha256:bb"]
    assert setup_env.locked_pins(lock, {"cpu", "dev"}) == setup_env.locked_pins(lock, {"cpu", "train"}) == everything


def project_folder(folder: Path) -> Path:
    """A project that pip can install without a network, with the build tool that is installed here."""
    folder.mkdir()
    (folder / "own.py").write_text("")
    build = '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    hatch = '[tool.hatch.build]\ndev-mode-dirs = ["."]\n'
    (folder / "pyproject.toml").write_text(f'{build}{hatch}[project]\nname = "own"\nversion = "1"\n')
    return folder


def fresh_environment(folder: Path) -> Path:
    """An environment that sees the packages of this one, and installs into itself."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (python,) = folder.glob("bin/python")
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(pytest.__file__).parents[1]
    (site / "outer.pth").write_text(str(here))
    return python


def test_a_locked_install_takes_the_wheel_of_that_hash_and_refuses_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    env = only_this(wheel_folder(wheels, "thing-1.0-py3-none-any.whl"))
    digest = hashlib.sha256((wheels / "thing-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    python, project = fresh_environment(tmp_path / "venv"), project_folder(tmp_path / "own")
    with pytest.raises(setup_pip.SetupError):
        setup_pip.install_locked(python, project, [f"thing==1.0 --hash=sha256:{'0' * 64}"], [], env)
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in capsys.readouterr().err
    assert not list(tmp_path.glob("venv/lib/python*/site-packages/thing-1.0.dist-info"))

    setup_pip.install_locked(python, project, [f"thing==1.0 --hash=sha256:{digest}"], [], env)
    assert list(tmp_path.glob("venv/lib/python*/site-packages/thing-1.0.dist-info"))
    assert list(tmp_path.glob("venv/lib/python*/site-packages/own-1.dist-info"))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("extras", "system", "machine", "python", "sentence"),
    [
        ({"cpu"}, "Linux", "x86_64", (3, 10), "install Python 3.11, 3.12 or 3.13"),
        ({"cpu"}, "Linux", "x86_64", (3, 14), "install Python 3.11, 3.12 or 3.13"),
        ({"cpu"}, "Darwin", "arm64", (3, 11), "run the container instead"),
        ({"cpu"}, "Linux", "riscv64", (3, 11), "run the container instead"),
        ({"cpu", "cuda"}, "Linux", "x86_64", (3, 11), "exclude each other"),
    ],
)
def test_a_machine_that_cannot_work_is_told_so_first(
    extras: set[str], system: str, machine: str, python: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(setup_env.SetupError, match=sentence):
        setup_env.check_machine(extras, system, machine, python)


def test_training_alone_works_on_a_mac() -> None:
    assert setup_env.check_machine({"train"}, "Darwin", "arm64", (3, 12)) is None


def test_an_unknown_extra_is_named_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup_env.main(["--venv", str(tmp_path / "venv"), "gpu"]) == 1
    assert "no such extra: gpu; there are serve, cpu, cuda, train, rg, ray, dev." in capsys.readouterr().err
    assert not (tmp_path / "venv").exists()


def test_missing_system_packages_are_one_sentence_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(setup_env.SetupError, match="run `sudo apt-get install python3-venv libnuma1`"):
        setup_env.install_system_packages(["python3-venv", "libnuma1"])


def test_a_failing_pip_shows_its_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(setup_env.SetupError, match="exit code 1"):
        setup_pip.run_pip_install(PYTHON, ["--dry-run", "no-such-distribution"], only_this(tmp_path))
    assert "No matching distribution found for no-such-distribution" in capsys.readouterr().err


@pytest.mark.parametrize("module", [setup_env, setup_pip])
def test_an_older_python_can_read_the_scripts_far_enough_to_be_told(module: ModuleType) -> None:
    """Their syntax, and what they import at the top, are of Python 3.9 at the latest."""
    import ast

    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 9))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert "tomllib" not in top
    assert source.count("from __future__ import annotations") == 1


# ------------------------------------------------------------------------------------------------------------ Makefile


def test_make_alone_lists_every_command() -> None:
    text = (setup_env.ROOT / "Makefile").read_text(encoding="utf-8")
    phony = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    listed = subprocess.run(["make", "-s", "-C", setup_env.ROOT], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()[1:]} == set(phony)
