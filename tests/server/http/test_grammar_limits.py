"""What constrains an output: schemas, tools, choices and grammars within limits, and without control characters."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.errors import InvalidRequest
from rtap_server.http.grammar_limits import MAX_CHARACTERS, MAX_ENTRIES, MAX_PROPERTIES, check_constraints
from tests.costs import cpu_seconds

WORDS = [f"word{i}" for i in range(MAX_ENTRIES + 1)]
RULES = "\n".join(f'r{i} ::= "a"' for i in range(501))


def in_response_format(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def in_structured_outputs(schema):
    return {"structured_outputs": {"json": schema}}


def as_text(schema):
    return {"structured_outputs": {"json": json.dumps(schema)}}


def in_a_tool(schema):
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


def in_a_responses_tool(schema):
    return {"tools": [{"type": "function", "name": "f", "parameters": schema}]}


def in_a_messages_tool(schema):
    return {"tools": [{"name": "f", "input_schema": schema}]}


def in_text(schema):
    return {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}


def in_output_config(schema):
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def in_a_legacy_tag(schema):
    tag = {"begin": "<f>", "schema": schema, "end": "</f>"}
    return {"response_format": {"type": "structural_tag", "structures": [tag], "triggers": ["<f"]}}


def in_a_tag_text(schema):
    return {"structured_outputs": {"structural_tag": json.dumps({"format": {"json_schema": schema}})}}


PLACES = [
    in_response_format, in_structured_outputs, as_text, in_a_tool, in_a_responses_tool, in_a_messages_tool, in_text,
    in_output_config, in_a_legacy_tag, in_a_tag_text,
]  # fmt: skip
BAD_SCHEMAS = {
    "enum has 1001 entries": {"enum": WORDS},
    "anyOf has 1001 entries": {"anyOf": [{"const": word} for word in WORDS]},
    "an object has 401 properties": {"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}},
    "has 2001 properties": {
        "$defs": {str(i): {"properties": {f"p{j}": {} for j in range(87)}} for i in range(23)},
    },
    "characters; at most 131072": {"const": "x" * (MAX_CHARACTERS + 1)},
    "minItems=1000000000000000000 is above": {"minItems": 10**18},
    "maxLength=200000 is above": {"maxLength": 200_000},
    "pattern repeats 1000000 times": {"pattern": "a{1,1000000}"},
    "pattern has 1001 alternatives": {"pattern": "a|" * 1001},
    "patternProperties repeats": {"patternProperties": {"a{1000000}": {}}},
    r"$ref contains the control character '\n'": {"$ref": '#/a\n{"levelname": "ERROR"}'},
    r"contains the control character '\x1b'": {"properties": {"\x1b[2J": {}}},
    r"enum contains the control character '\x00'": {"enum": ["\x00"]},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sentence", BAD_SCHEMAS)
def test_a_schema_is_refused_wherever_it_stands(place, sentence):
    request = place(BAD_SCHEMAS[sentence])
    with pytest.raises(InvalidRequest) as refused:
        check_constraints(request)
    # A schema of too many characters that is sent as text is refused before it is parsed.
    assert sentence.partition(";")[0] in str(refused.value)
    assert refused.value.param == next(iter(request))
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        ({"choice": WORDS}, "choice has 1001 entries"),
        ({"regex": "|".join(WORDS) + "|x"}, "regex has 1001 alternatives"),
        ({"regex": "a" * 40_000}, "regex has 40000 characters"),
        ({"regex": "a\x00"}, r"control character '\x00'"),
        ({"grammar": RULES}, "grammar has 501 rules"),
        ({"grammar": RULES.replace(" ::=", ":")}, "grammar has 501 rules"),
        ({"grammar": 'start: "a"~1..1000000'}, "grammar repeats 1000000 times"),
        ({"grammar": 'start: %json {"minItems": 1e18}'}, "contains %json"),
    ],
)
def test_a_grammar_is_refused(constraint, sentence):
    for where in ("", "sampling_params."):
        with pytest.raises(InvalidRequest) as refused:
            check_constraints({"structured_outputs": constraint}, where)
        assert sentence in str(refused.value)
        assert refused.value.param == f"{where}structured_outputs"


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"response_format": None, "tools": None, "text": "a\x00", "structured_outputs": 3},
        in_a_tool({"description": "two\nlines", "properties": {"description": {"enum": ["a\n", "b"]}}}),
        in_a_tool({"properties": {f"p{i}": {"type": "string", "maxLength": 1000} for i in range(MAX_PROPERTIES)}}),
        in_response_format({"enum": WORDS[:MAX_ENTRIES]}),
        {"structured_outputs": {"grammar": 'root ::= "a"\nb ::= [0-9]{1,3}'}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"json": "[" * 100_000}},
        {"structured_outputs": {"json_object": True}},
        {"messages": [{"content": "\x00"}], "metadata": {"$ref": "\n"}},
    ],
)
def test_what_is_within_the_limits_passes(request_):
    check_constraints(request_)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["$ref", "pattern", "json"]), inner),
)


@given(value=VALUES, field=st.sampled_from(["response_format", "structured_outputs", "tools", "text"]))
def test_any_value_is_taken_or_refused(value, field):
    with contextlib.suppress(InvalidRequest):
        check_constraints({field: value})


@pytest.mark.parametrize(
    "request_",
    [
        in_structured_outputs({"enum": WORDS * 50}),
        {"structured_outputs": {"json": json.dumps({"enum": ["a" * 100] * 80_000})}},
        {"structured_outputs": {"grammar": "a" * 8_000_000}},
        {"tools": [{"a": [[]] * 20}] * 900},
        {"tools": [{"name": "x" * 100, "parameters": {"properties": {str(i): {} for i in range(20)}}}] * 900},
    ],
    ids=["enum", "text", "grammar", "wide", "tools"],
)
def test_megabytes_are_looked_through_at_once(request_):
    def check():
        with contextlib.suppress(InvalidRequest):
            check_constraints(request_)

    assert cpu_seconds(check) < 0.3
