"""What can be held about the image, compose and Prometheus files without a container engine."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage, in order, those of the stages it is built from first."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
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
def test_images_run_as_nobody_in_particular_and_report_their_health(target: str) -> None:
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


def test_whatever_is_copied_is_let_through_and_nothing_else() -> None:
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


@pytest.mark.parametrize("name", list(SERVICES))
def test_services_are_locked_down(name: str) -> None:
    service = SERVICES[name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["read_only"] is True
    assert any(entry.startswith("/tmp:") for entry in service["tmpfs"])
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] == "CMD"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert not any("docker.sock" in volume for volume in service["volumes"])


def test_images_are_pinned_by_tag() -> None:
    bases = [line.split()[1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("FROM ")]
    outside = [base for base in bases if base not in {"scratch", *stages()}]
    for image in [*outside, *(service["image"] for service in SERVICES.values() if "build" not in service)]:
        assert ":" in image
        assert not image.endswith(":latest")


def test_prometheus_scrapes_the_server_under_its_compose_name() -> None:
    config = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets["rtap"] == ["server:8000"]
    assert "server" in SERVICES
    mounted = next(v for v in SERVICES["prometheus"]["volumes"] if v.endswith("/prometheus.yml:ro")).split(":")
    assert (COMPOSE.parent / mounted[0]).resolve() == PROMETHEUS
    assert f"--config.file={mounted[1]}" in SERVICES["prometheus"]["command"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus (.ci/run has it)")
def test_promtool_accepts_the_prometheus_config() -> None:
    result = subprocess.run(["promtool", "check", "config", PROMETHEUS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install it (.ci/run does)")
def test_shell_scripts_are_shellcheck_clean() -> None:
    result = subprocess.run(["shellcheck", ROOT / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")
