"""Write build/sbom.json: a CycloneDX bill of what is installed in this environment, and what requires what.

Names, versions, licences and requirements are those that the packages state themselves; nothing is looked up.
"""

import sys
import sysconfig
from email.message import Message
from importlib import metadata
from typing import Any, cast

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import bom as cyclonedx_bom
from cyclonedx.model import component as cyclonedx_component
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from lock import closure
from packageurl import PackageURL
from packaging.utils import canonicalize_name
from setup_env import ROOT

# The library's decorators hide the types of these.
Bom: Any = cyclonedx_bom.Bom
Component: Any = cyclonedx_component.Component
ComponentType = cyclonedx_component.ComponentType

WRITTEN = ROOT / "build" / "sbom.json"


def installed() -> dict[str, metadata.Distribution]:
    """Every distribution of this environment, by its normalised name; none that a package carries inside itself."""
    found = metadata.distributions(path=[sysconfig.get_path("purelib")])
    return {str(canonicalize_name(distribution.name)): distribution for distribution in found}


def component(name: str, distribution: metadata.Distribution) -> Any:
    """One package. Its licence is an SPDX expression where it states one, else the first line of what it says."""
    told = cast(Message, distribution.metadata)  # what it is, though its protocol does not say so
    lines = str(told.get("License-Expression") or told.get("License") or "").strip().splitlines()
    return Component(
        type=ComponentType.APPLICATION if name == "rtap" else ComponentType.LIBRARY,
        name=name,
        version=distribution.version,
        purl=PackageURL("pypi", name=name, version=distribution.version),
        bom_ref=f"{name}=={distribution.version}",
        licenses=[LicenseFactory().make_from_string(lines[0])] if lines else [],
    )


def bill(distributions: dict[str, metadata.Distribution]) -> Any:
    """All of them, the project itself as the bill's subject."""
    components = {name: component(name, distribution) for name, distribution in distributions.items()}
    bom = Bom(components=[found for name, found in components.items() if name != "rtap"])
    bom.metadata.component = components["rtap"]
    for name, distribution in distributions.items():
        asked = "rtap[cpu,cuda,dev]" if name == "rtap" else name
        required = closure([asked], {name: distribution.requires or ()}) & components.keys() - {name}
        bom.register_dependency(components[name], [components[other] for other in sorted(required)])
    return bom


def main() -> int:
    """Command line: `sbom.py`, no flags."""
    bom = bill(installed())
    WRITTEN.parent.mkdir(exist_ok=True)
    make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_to_file(str(WRITTEN), True, indent=1)
    print(f"{WRITTEN.relative_to(ROOT)}: {len(bom.components)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
