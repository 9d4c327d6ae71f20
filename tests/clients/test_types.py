"""The types of both clients have the same fields and values as the server's schema."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import rtap_client
from rtap_client import types
from rtap_core import types as server_types
from rtap_core.features import LogprobFeatures
from rtap_core.types import Continuation, Policy, Select, StopReason
from rtap_server.http import schema

LITERALS = {
    Policy: types.Policy,
    Select: types.Select,
    Continuation: types.Continuation,
    StopReason: types.StopReason,
}


def members(hint: Any) -> Any:
    """The members of a type, with the server's enums replaced by the client's literals."""
    literals = {LITERALS[part] for part in get_args(hint) if part in LITERALS}
    for literal in literals:
        return frozenset(get_args(literal)) | (set(get_args(hint)) - set(LITERALS))
    found = [member for part in get_args(hint) for member in (get_args(part) or (part,))]
    return frozenset(found or [hint])


@pytest.mark.parametrize(("enum", "literal"), LITERALS.items())
def test_the_literals_are_the_servers(enum, literal):
    assert set(get_args(literal)) == {member.value for member in enum}


def test_the_request_options_are_the_servers():
    ours = get_type_hints(types.RtapOptions)
    theirs = {name: field.annotation for name, field in schema.RtapOptions.model_fields.items()}
    assert {name: members(hint) for name, hint in ours.items()} == {
        name: members(hint) for name, hint in theirs.items()
    }


def _cycle() -> server_types.Cycle:
    values: dict[str, Any] = {f.name: 1 for f in fields(server_types.Cycle)} | {"answer": "4", "think": "2+2"}
    return server_types.Cycle(**values | {"logprobs": LogprobFeatures(-0.5, -1.0, -1.0, -0.2, 3)})


def test_a_cycle_has_the_servers_fields():
    assert set(types.Cycle.model_fields) == set(schema.cycle_object(_cycle(), with_think=True))


def test_a_trajectory_has_the_servers_fields():
    shown = schema.trajectory_object(
        server_types.Trajectory(Policy.VOTE, StopReason.SAMPLES, (_cycle(),), 0, "timeout", 0.1, 0.2, None, None),
        with_think=True,
    )
    assert set(types.Trajectory.model_fields) == set(shown)
    assert set(types.Candidate.model_fields) == set(shown["candidates"][0])


def typescript(pattern: str) -> str:
    """The first group of a pattern in the TypeScript client's types."""
    text = (Path(__file__).resolve().parents[2] / "clients" / "typescript" / "src" / "types.ts").read_text("utf-8")
    return re.search(pattern, text, re.DOTALL)[1]


@pytest.mark.parametrize("enum", LITERALS)
def test_typescript_has_the_same_literals(enum):
    union = typescript(rf"export type {enum.__name__} =(.*?);")
    assert set(re.findall(r"'(\w+)'", union)) == {member.value for member in enum}


@pytest.mark.parametrize("ours", [types.RtapOptions, types.Cycle, types.Trajectory, types.Score, types.Feedback])
def test_typescript_has_the_same_fields(ours):
    body = typescript(rf"export interface {ours.__name__} {{(.*?)\n}}")
    assert re.findall(r"^  (\w+)\??:", body, re.MULTILINE) == list(ours.__annotations__)


def test_every_exported_name_is_there():
    assert {name for name in rtap_client.__all__ if getattr(rtap_client, name) is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rtap_client.nothing  # noqa: B018
