"""The compose files and the configuration that they mount."""

import hashlib
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from deploy.compose.make_keys import main as make_keys
from rtap_server.http.api_keys import load_keys

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "compose"
PROMETHEUS = ROOT / "deploy" / "prometheus"
BASE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
KEYS: dict[str, Any] = yaml.safe_load((FOLDER / "compose.keys.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = BASE["services"]


def seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration[:-1])


def mounts(service: str) -> dict[str, Path]:
    """Mounted folders of this repository: path in the container to folder."""
    split = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {parts[1]: (FOLDER / parts[0]).resolve() for parts in split if parts[0].startswith(".")}


@pytest.mark.parametrize("name", ["compose.yaml", "compose.keys.yaml"])
def test_it_follows_the_compose_specification(name: str) -> None:
    whole = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    PyCompose.from_yaml(yaml.safe_dump(whole))  # dumped, because PyCompose does not know merge keys


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
    assert service["mem_limit"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert not any("docker.sock" in volume for volume in service["volumes"])


def test_images_are_pinned_by_tag() -> None:
    for service in SERVICES.values():
        assert "build" in service or service["image"].partition(":")[2] not in ("", "latest")


@pytest.mark.parametrize("name", list(SERVICES))
def test_mounts_exist_and_are_read_only(name: str) -> None:
    for volume in SERVICES[name]["volumes"]:
        source, _, target = volume.partition(":")
        if source.startswith("."):
            assert (FOLDER / source).is_dir()
            assert target.endswith(":ro")
        else:
            assert source in BASE["volumes"]


def test_the_server_drains_within_its_grace_period() -> None:
    for file in (BASE, KEYS):
        command = file["services"]["server"]["command"]
        drain = int(command[command.index("--drain-seconds") + 1])
        assert seconds(SERVICES["server"]["stop_grace_period"]) > drain


@pytest.mark.parametrize("file", [BASE, KEYS], ids=["compose.yaml", "compose.keys.yaml"])
def test_prometheus_reads_a_config_that_scrapes_the_server_under_its_compose_name(file: dict[str, Any]) -> None:
    (config,) = [p.removeprefix("--config.file=") for p in file["services"]["prometheus"]["command"] if "config" in p]
    target, folder = next(iter(mounts("prometheus").items()))
    loaded = yaml.safe_load((folder / Path(config).relative_to(target)).read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in loaded["scrape_configs"]}
    assert targets["rtap"] == ["server:8000"]
    assert {"server"} < set(SERVICES)
    assert all(list(folder.glob(pattern)) for pattern in loaded["rule_files"])


def test_with_keys_prometheus_only_adds_the_key() -> None:
    plain, keyed = (
        yaml.safe_load((PROMETHEUS / name).read_text(encoding="utf-8"))
        for name in ("prometheus.yml", "prometheus.keys.yml")
    )
    (job,) = [job for job in keyed["scrape_configs"] if job["job_name"] == "rtap"]
    assert job.pop("authorization") == {"credentials_file": "/run/secrets/metrics_key"}
    assert keyed == plain


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus (.ci/run has it)")
@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus.keys.yml"])
def test_promtool_accepts_the_prometheus_config(name: str) -> None:
    command = ["promtool", "check", "config", "--syntax-only", PROMETHEUS / name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    seen = mounts("grafana")
    provisioning = seen["/etc/grafana/provisioning"]
    providers = [
        provider
        for file in (provisioning / "dashboards").glob("*.yml")
        for provider in yaml.safe_load(file.read_text(encoding="utf-8"))["providers"]
    ]
    assert [p["options"]["path"] for p in providers if list(seen[p["options"]["path"]].glob("*.json"))]
    (source,) = [
        source
        for file in (provisioning / "datasources").glob("*.yml")
        for source in yaml.safe_load(file.read_text(encoding="utf-8"))["datasources"]
    ]
    assert source["url"] == "http://prometheus:9090"


def test_secrets_are_files_that_git_ignores_and_every_secret_is_used() -> None:
    used = {name for service in KEYS["services"].values() for name in service["secrets"]}
    assert used == set(KEYS["secrets"])
    for secret in KEYS["secrets"].values():
        path = FOLDER / secret["file"]
        result = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False)
        assert result.returncode == 0, f"{path} could be committed"
    command = KEYS["services"]["server"]["command"]
    assert command[command.index("--api-keys-file") + 1] == "/run/secrets/api_keys"


def test_made_keys_are_accepted_and_the_clients_key_is_not_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "secrets"
    assert make_keys(folder) == 0
    client = capsys.readouterr().out.split()[-1]
    keys = load_keys(folder / "keys.toml", {})
    found = keys.find(client.encode())
    assert found is not None
    assert (found.name, found.opens_metrics_only) == ("client", False)
    scraper = keys.find((folder / "metrics.key").read_bytes())
    assert scraper is not None
    assert scraper.opens_metrics_only
    assert client not in "".join(file.read_text(encoding="utf-8") for file in folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    digests = {key["sha256"] for key in tomllib.loads((folder / "keys.toml").read_text(encoding="utf-8"))["keys"]}
    assert hashlib.sha256(client.encode()).hexdigest() in digests
    assert make_keys(folder) == 1  # keys in use are not overwritten
