"""Static checks of the Dockerfile; deploy/image/verify.py builds and runs it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.image.verify import VerifyError, base_of

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def stages() -> dict[str, list[str]]:
    """Instructions by stage in order, beginning with those of its base stages."""
    text = DOCKERFILE.replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        words = line.split()
        if words[0] == "FROM":
            current = list(found.get(words[1], []))
            found[words[3]] = current
        elif not line.startswith("#"):
            current.append(" ".join(words))
    return found


def test_the_dockerfile_is_hadolint_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_run_unprivileged_and_have_a_health_check(target: str) -> None:
    instructions = stages()[target]
    last = {line.split()[0]: line for line in instructions}
    assert last["USER"] == "USER 10001:10001"
    assert last["ENTRYPOINT"] == 'ENTRYPOINT ["rtap", "serve", "--host", "0.0.0.0", "--port", "8000"]'
    assert last["EXPOSE"] == "EXPOSE 8000"
    assert "--start-period=120s" in last["HEALTHCHECK"]
    assert "/live" in last["HEALTHCHECK"]
    assert any("HOME=/cache " in line for line in instructions)
    assert last["VOLUME"] == "VOLUME /cache"


def test_cpu_is_the_default_target() -> None:
    assert list(stages())[-1] == "cpu"


def test_dockerignore_lets_through_exactly_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for instructions in stages().values()
        for line in instructions
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert "*" in lines
    assert let_through == copied


def test_the_base_is_pinned_by_tag() -> None:
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base_of(DOCKERFILE).image)
    assert base_of(DOCKERFILE).release == "bookworm"


def test_a_second_base_is_refused() -> None:
    with pytest.raises(VerifyError, match="debian:12"):
        base_of(DOCKERFILE + "\nFROM debian:12 AS other\n")


def test_no_secret_is_baked_in() -> None:
    """Build arguments and variables stay readable in an image's history."""
    set_here = [line for lines in stages().values() for line in lines if line.startswith(("ENV ", "ARG "))]
    assert set_here
    assert not [line for line in set_here if re.search(r"KEY|TOKEN|SECRET|PASSWORD", line)]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install it (.ci/run does)")
def test_shell_scripts_are_shellcheck_clean() -> None:
    result = subprocess.run(["shellcheck", ROOT / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")
