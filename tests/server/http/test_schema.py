"""The document names what the server takes beside vLLM's fields, and promises what the checks keep."""

import pytest
from fastapi import FastAPI
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from rtap_core.errors import InvalidRequest
from rtap_server.http.recursion_fields import parse_options
from rtap_server.http.route_kinds import RECURSIVE_PATHS
from rtap_server.http.schema import RtapOptions, describe_rtap
from rtap_server.settings import Settings

SETTINGS = Settings(max_cycles=4, max_cycles_limit=5)


class Ask(BaseModel):
    """A request of vLLM's, as far as it matters here."""

    model: str


@pytest.fixture(scope="module")
def document() -> dict:
    app = FastAPI()
    for path in RECURSIVE_PATHS:

        @app.post(path)
        def take(ask: Ask) -> None: ...

    describe_rtap(app, SETTINGS)
    assert app.openapi() == app.openapi()
    return app.openapi()


def test_the_four_endpoints_name_the_field(document):
    assert document["components"]["schemas"]["Ask"]["properties"]["rtap"] == {
        "$ref": "#/components/schemas/RtapOptions"
    }
    described = document["components"]["schemas"]["RtapOptions"]
    assert set(described["properties"]) == set(RtapOptions.model_fields)
    assert {"Policy", "Select"} <= set(document["components"]["schemas"])


@pytest.mark.parametrize(
    "raw",
    [
        {}, {"max_cycles": 5}, {"max_cycles": 6}, {"max_cycles": 0}, {"threshold": 1.01}, {"policy": "vote"},
        {"policy": "best"}, {"select": None}, {"deadline_seconds": 0}, {"samples": 33}, {"treshold": 1}, [], None,
    ],
)  # fmt: skip
def test_the_document_allows_what_the_server_takes_and_nothing_else(document, raw):
    schema = {"$ref": "#/components/schemas/RtapOptions", "components": document["components"]}
    try:
        parse_options({"rtap": raw}, SETTINGS)
        is_taken = True
    except InvalidRequest:
        is_taken = False
    assert Draft202012Validator(schema).is_valid(raw) == is_taken
