"""Limits on what constrains the output: JSON schemas, tools, choices, regular expressions, grammars, structural tags.

Checked before vLLM parses any of them. ``rtap_server.engine.grammars`` compiles what is left.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, cast

from rtap_core.errors import InvalidRequest

MAX_CHARACTERS = 2**17  # of names and values in all schemas of a request; descriptions count too
MAX_GRAMMAR_CHARACTERS = 2**15  # of one regular expression or grammar
MAX_RULES = 500
MAX_ENTRIES = 1000  # of an enum or another list, and alternatives of a regular expression
MAX_PROPERTIES, MAX_ALL_PROPERTIES = 400, 2000
MAX_ITEMS, MAX_REPETITIONS = 10_000, 100_000

_CONSTRAINTS = ("response_format", "structured_outputs", "tools", "functions", "text", "output_config", "output_format")
_JSON_TEXTS = frozenset({"json", "structural_tag"})
_GRAMMARS = frozenset({"pattern", "regex", "grammar", "definition", "whitespace_pattern"})
_ITEMS = frozenset({"minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains"})
_LENGTHS = frozenset({"minLength", "maxLength"})
# Values without line breaks: names, and what parsers of schemas quote.
_NAMES = frozenset({"$ref", "$id", "$anchor", "$schema", "type", "format", "name", "required"})
_NUMBERS = re.compile(r"[{,~.]\s*(\d+)")
_RULE = re.compile(r"::=|^\s*[?!]?\w+\s*:", re.MULTILINE)


def check_constraints(request: Mapping[str, Any], inside: str = "") -> None:
    """Raise InvalidRequest, naming the field, for a constraint above a limit or with control characters."""
    for field in _CONSTRAINTS:
        if isinstance(value := request.get(field), dict | list):
            _check(cast(Any, value), inside + field)


def _check(constraint: dict[str, Any] | list[Any], param: str) -> None:
    characters = properties = 0
    for name, value in _values(constraint, param):
        if isinstance(value, str):
            characters += len(value)
            _check_text(name, value, param)
        elif isinstance(value, list):
            if len(cast(list[Any], value)) > MAX_ENTRIES:
                raise InvalidRequest(
                    f"{name} has {len(cast(list[Any], value))} entries; at most {MAX_ENTRIES} are allowed", param=param
                )
        elif isinstance(value, dict):
            value = cast(dict[str, Any], value)
            characters += sum(map(len, value))
            for key in value:
                _refuse_controls(key, f"a name in {param}", param)
            if name == "patternProperties":
                for pattern in value:
                    _check_grammar(name, pattern, param)
            if name in ("properties", "patternProperties"):
                properties += len(value)
                _refuse_above(len(value), MAX_PROPERTIES, "an object has {} properties", param)
        elif isinstance(value, int | float) and name in _ITEMS | _LENGTHS:
            limit = MAX_ITEMS if name in _ITEMS else MAX_REPETITIONS
            if value > limit:
                raise InvalidRequest(f"{name}={value} is above the limit of {limit}; leave it out", param=param)
    _refuse_above(properties, MAX_ALL_PROPERTIES, param + " has {} properties", param)
    _refuse_above(characters, MAX_CHARACTERS, param + " has {} characters", param)


def _values(constraint: dict[str, Any] | list[Any], param: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in a constraint, itself included; an entry of a list has the list's name.

    Texts that vLLM parses as JSON are parsed, those that are none are left to vLLM. Without recursion: nesting is
    bounded elsewhere, but not inside such texts."""
    level: list[tuple[str, Any]] = [(param, constraint)]
    while level:
        below = list[tuple[str, Any]]()
        for name, value in level:
            if name in _JSON_TEXTS and isinstance(value, str):
                value = _parsed(value, param)
            yield name, value
            if isinstance(value, dict):
                below += cast(dict[str, Any], value).items()
            elif isinstance(value, list):
                below += [(name, entry) for entry in cast(list[Any], value)]
        level = below


def _parsed(text: str, param: str) -> Any:
    _refuse_above(len(text), MAX_CHARACTERS, param + " has {} characters", param)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _check_text(name: str, value: str, param: str) -> None:
    _refuse_controls(value, name, param, allowed="" if name in _NAMES else "\t\n\r")
    if name in _GRAMMARS:
        _check_grammar(name, value, param)


def _check_grammar(name: str, text: str, param: str) -> None:
    _refuse_above(len(text), MAX_GRAMMAR_CHARACTERS, name + " has {} characters", param)
    _refuse_above(text.count("|"), MAX_ENTRIES, name + " has {} alternatives", param)
    largest = max((int(number[:18]) for number in _NUMBERS.findall(text)), default=0)
    _refuse_above(largest, MAX_REPETITIONS, name + " repeats {} times", param)
    if name in ("grammar", "definition"):
        _refuse_above(sum(1 for _ in _RULE.finditer(text)), MAX_RULES, name + " has {} rules", param)
        if "%json" in text:
            raise InvalidRequest(f"{name} contains %json: send the schema itself, not inside a grammar", param=param)


def _refuse_above(count: int, limit: int, what: str, param: str) -> None:
    if count > limit:
        raise InvalidRequest(f"{what.format(count)}; at most {limit} are allowed", param=param)


def _refuse_controls(text: str, name: str, param: str, allowed: str = "") -> None:
    if text.isprintable():
        return
    for character in text:
        if unicodedata.category(character) == "Cc" and character not in allowed:
            raise InvalidRequest(f"{name} contains the control character {character!r}: remove it", param=param)
