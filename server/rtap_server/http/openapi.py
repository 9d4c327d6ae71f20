"""Add the ``rtap`` request object, with this server's limits, to vLLM's OpenAPI document."""

from typing import Any

from fastapi import FastAPI

from rtap_server.http.route_kinds import RECURSIVE_PATHS
from rtap_server.http.schema import RtapOptions
from rtap_server.settings import Settings

_REFERENCES = "#/components/schemas/"
_CEILINGS = {
    "max_cycles": "max_cycles_limit",
    "samples": "samples_limit",
    "deadline_seconds": "deadline_seconds_limit",
}


def describe_rtap(app: FastAPI, settings: Settings) -> None:
    """Make ``app.openapi`` describe ``rtap`` on the recursive routes."""
    describe_vllm = app.openapi  # FastAPI caches its document, so the field is added once

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            _add_options(describe_vllm(), settings)
        return describe_vllm()

    app.openapi = describe


def _add_options(document: dict[str, Any], settings: Settings) -> None:
    options = RtapOptions.model_json_schema(ref_template=_REFERENCES + "{model}")
    for name, ceiling in _CEILINGS.items():
        number = next(one for one in options["properties"][name]["anyOf"] if one["type"] != "null")
        number["maximum"] = getattr(settings, ceiling)
    schemas: dict[str, Any] = document["components"]["schemas"]
    schemas |= options.pop("$defs") | {"RtapOptions": options}
    for path in RECURSIVE_PATHS & document["paths"].keys():
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schemas[body["$ref"].removeprefix(_REFERENCES)]["properties"]["rtap"] = {"$ref": _REFERENCES + "RtapOptions"}
