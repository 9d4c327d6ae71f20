"""Fuzz a running server over its /openapi.json with valid and invalid requests.

    python -m tests.stress.fuzz

No reply may be a 5xx, every error has OpenAI's shape and leaks no internals, and a good request still passes at the
end. Bodies come from schemathesis, hostile schemas, grammars, tools and extra arguments from here. Exits 1 with the
offending request when anything is found.
"""

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import APIOperation, Case, GenerationMode

from rtap_server.http.route_kinds import BLOCKED_PATHS, RECURSIVE_PATHS
from rtap_training.evaluation.server_process import running_server, serve_command
from tests.error_shapes import error_of

Operation = APIOperation[Any, Any, Any, Any]
AnyCase = Case[Any]
# Paths that are not fuzzed, with the reason.
EXCLUDED: Mapping[str, str] = {
    **dict.fromkeys(BLOCKED_PATHS, "blocked by its path, whatever the body (tests/e2e/test_bad_input.py)"),
    "/v1/systemone": "501 for every body: the model makes no structured decisions",
}
# Mode SERVED makes a valid body answerable: a short question, without fields that are always refused.
_REFUSED = (
    "chat_template", "chat_template_kwargs", "use_beam_search", "background", "previous_response_id", "prompt_embeds",
    "previous_input_messages", "messages", "input", "prompt",
)  # fmt: skip
_QUESTION = "make 82 from 3, 7, 25"
_QUESTIONS: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": _QUESTION}]},
    "/v1/messages": {"messages": [{"role": "user", "content": _QUESTION}]},
    "/v1/completions": {"prompt": _QUESTION},
    "/v1/responses": {"input": _QUESTION},
}
_MOST: Mapping[str, int] = {"max_tokens": 64, "max_completion_tokens": 64, "max_output_tokens": 64, "n": 4}
SERVED, CONSTRAINED = "served", "constrained"  # the latter is the former with fields of `constraints`
MODES = (GenerationMode.POSITIVE.value, GenerationMode.NEGATIVE.value, SERVED, CONSTRAINED)
_WORDS = [f"word{number}" for number in range(3000)]
_SCHEMAS: Sequence[Any] = (
    True,
    {},
    [],
    {"$ref": "#"},
    {"$ref": "#/nowhere"},
    {"$ref": '#/a\n{"levelname": "ERROR"}'},
    {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    {"enum": []},
    {"enum": _WORDS},
    {"not": {}},
    {"type": "string", "pattern": "(?<=a)b\\1"},
    {"type": "string", "format": "\x1b[2J"},
    {"type": "integer", "minimum": 1e300},
    {"type": "array", "minItems": 10**18},
    {"type": "object", "patternProperties": {"^C[": {}}},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "object", "properties": {word: {"type": "string"} for word in _WORDS[:300]}},
)
_TEXTS = (
    "root ::= root",
    "root ::= (",
    'root ::= ""',
    "start: start",
    "start: /(/",
    "start: %json {}",
    "(a|b|.)?" * 50,
    "((a{1,99}){1,99}){1,99}",
    "a{1,1000000}",
    "|".join(_WORDS),
    "(" * 3000,
    "\\",
    "\x00",
    "{",
    "{}",
    "null",
    '{"format": {}}',
    '{"structures": [{"begin": "a", "schema": {"$ref": "#"}, "end": "b"}], "triggers": ["a"]}',
)
_KEYWORDS = (
    "type", "properties", "required", "items", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "$defs", "pattern",
    "format", "minItems", "maxItems", "minLength", "maxLength", "minimum", "multipleOf", "additionalProperties",
    "x-guidance",
)  # fmt: skip
_LONGEST_SECONDS = 20.0  # the client disconnects after it
_INTERNALS = re.compile(
    r"0x[0-9a-f]{6,}|Traceback|File \"|/(?:tmp|usr|root|home|opt|var|proc|work|site-packages)/|\.py\b"
)
GOOD: Mapping[str, Any] = {"model": "rtap", **_QUESTIONS["/v1/chat/completions"]}
_GOOD_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and the request that caused it."""

    operation: str
    mode: str
    problem: str
    request: str


@dataclass(slots=True)
class Report:
    """replies: by operation, mode and status (``left``: took too long; ``unsendable``: not sent by HTTP clients)."""

    replies: Counter[tuple[str, str, str]] = field(default_factory=Counter[tuple[str, str, str]])
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def requests(self) -> int:
        """Number of replies."""
        return sum(n for (_, _, status), n in self.replies.items() if status.isdigit())


def fuzz(url: str, *, seconds: float, examples: int, seed: int, log_line: Callable[[str], None]) -> Report:
    """Run rounds over all operations until the time is up. The first is always complete."""
    report, began = Report(), time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schemathesis warns about bodies that it cannot generate
        document: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")  # its types are generic and open
        operations: list[Operation] = [found.ok() for found in document.get_all_operations()]
        for round_ in itertools.count():
            for operation, mode in _targets(operations):
                if round_ and time.monotonic() - began > seconds:
                    return report
                _run(operation, mode, examples, hash((seed, round_)), report)
            log_line(f"round {round_}: {report.requests} requests, {len(report.findings)} findings")
            if time.monotonic() - began > seconds:
                return report
    raise AssertionError("unreachable")


def _targets(operations: Sequence[Operation]) -> Iterator[tuple[Operation, str]]:
    for operation in operations:
        if operation.path not in EXCLUDED:
            modes = MODES if operation.path in RECURSIVE_PATHS else MODES[:2]  # no question is known for the others
            yield from ((operation, mode) for mode in modes)


def _run(operation: Operation, mode: str, examples: int, seed: int, report: Report) -> None:
    generation = GenerationMode.POSITIVE if mode in (SERVED, CONSTRAINED) else GenerationMode(mode)
    cases: SearchStrategy[AnyCase] = cast(Any, operation).as_strategy(generation_mode=generation)
    settings = hypothesis.settings(
        max_examples=examples, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=cast(list[HealthCheck], list(HealthCheck)),
    )  # fmt: skip

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(case=cases, fields=constraints() if mode == CONSTRAINED else st.just({}))
    def each(case: AnyCase, fields: dict[str, Any]) -> None:
        if mode in (SERVED, CONSTRAINED):
            case.body = served(case.body, operation.path)
        if mode == CONSTRAINED and isinstance(case.body, dict):
            case.body = {**cast(dict[str, Any], case.body), **fields}
        _send_case(case, operation.label, mode, report)

    try:
        each()
    except Unsatisfiable:  # a request without parameters
        report.replies[operation.label, mode, "nothing to vary"] += 1


def served(body: Any, path: str) -> Any:
    """An answerable version of a body."""
    if not isinstance(body, dict):
        return body
    fields = {k: v for k, v in cast(dict[str, Any], body).items() if k not in _REFUSED}
    few = {k: max(1, min(v, most)) for k, most in _MOST.items() if isinstance(v := fields.get(k), int)}
    return {"max_tokens": 64, **fields, **few, "model": "rtap", **_QUESTIONS[path]}


def constraints() -> SearchStrategy[dict[str, Any]]:
    """Fields of all four endpoints that constrain an output or reach the engine; each ignores the others' fields."""
    texts = st.sampled_from(_TEXTS) | st.text(max_size=30)
    numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    scalars = texts | numbers | st.booleans() | st.none()
    schemas = st.recursive(
        st.sampled_from(_SCHEMAS) | scalars,
        lambda inner: st.dictionaries(st.sampled_from(_KEYWORDS), inner | st.lists(inner, max_size=3), max_size=5),
        max_leaves=8,
    )

    def fields(**values: Any) -> SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries(
            {
                name: cast(SearchStrategy[Any], v if isinstance(v, SearchStrategy) else st.just(v))
                for name, v in values.items()
            }
        )

    formats = st.one_of(
        fields(type="json_schema", json_schema=fields(name=texts, schema=schemas)),
        fields(type="json_schema", name=texts, schema=schemas),
        fields(type="structural_tag", format=schemas),
        fields(type="json_object"),
    )
    tools = st.one_of(
        fields(type="function", function=fields(name=texts, parameters=schemas)),
        fields(type="function", name=texts, parameters=schemas),
        fields(name=texts, input_schema=schemas),
    )
    structured_outputs = st.one_of(
        fields(json=schemas),
        fields(regex=texts),
        fields(grammar=texts),
        fields(structural_tag=texts),
        fields(choice=st.lists(texts, max_size=3) | st.just(_WORDS)),
        fields(json_object=st.booleans()),
    )
    choices = st.sampled_from(["auto", "none", "required", {"type": "any"}, {"type": "function", "name": "a\n"}])
    arguments = st.sampled_from(["kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode", "session_id"])
    switches = st.sampled_from(["enable_thinking", "thinking", "tools", "messages", "raise_exception"])
    optional = {
        "response_format": formats,
        "structured_outputs": structured_outputs,
        "text": fields(format=formats),
        "output_config": fields(format=formats),
        "tools": st.lists(tools, max_size=3),
        "tool_choice": choices,
        "vllm_xargs": st.dictionaries(arguments, schemas | st.lists(scalars, max_size=2), max_size=2),
        "chat_template_kwargs": st.dictionaries(switches | texts, scalars, max_size=2),
    }
    return st.fixed_dictionaries({}, optional=cast(dict[str, SearchStrategy[Any]], optional))


def _send_case(case: AnyCase, label: str, mode: str, report: Report) -> None:
    try:
        request: dict[str, Any] = cast(Any, case).as_transport_kwargs()
        status, headers, content = _send(request)
    except requests.exceptions.ConnectionError as error:
        report.findings.append(Finding(label, mode, f"no answer: {type(error).__name__}", _shown(case)))
        return
    except (requests.RequestException, ValueError):  # a header with a line break, say
        report.replies[label, mode, "unsendable"] += 1
        return
    if content is None:
        report.replies[label, mode, "left"] += 1
        return
    report.replies[label, mode, str(status)] += 1
    problem = problem_of(status, headers, content, _shown(case))
    if problem is not None:
        report.findings.append(Finding(label, mode, f"{status}: {problem}", _shown(case)))


def _send(request: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes | None]:
    """(status, headers, body); no body when it took too long."""
    until, parts = time.monotonic() + _LONGEST_SECONDS, list[bytes]()
    with requests.Session() as session:
        try:
            reply = session.request(**request, timeout=_LONGEST_SECONDS, stream=True)
            with closing(reply):
                for part in reply.iter_content(None):
                    parts.append(part)
                    if time.monotonic() > until:
                        return 0, {}, None
                return reply.status_code, reply.headers, b"".join(parts)
        except requests.exceptions.Timeout:
            return 0, {}, None


def problem_of(status: int, headers: Mapping[str, str], content: bytes, request: str = "") -> str | None:
    """The first problem of a reply, None without one. request: its text, which errors may quote."""
    if "x-request-id" not in headers:
        return "no x-request-id"
    if status < 400:
        errors = [line for line in content.splitlines() if line.startswith(b'data: {"error"')]
        return next((f"a stream failed: {line[:300]!r}" for line in errors if _is_failure(line[6:])), None)
    if status >= 500:
        return f"a server error: {content[:300]!r}"
    try:
        body = json.loads(content)
        error = error_of("/v1/messages" if body.get("type") == "error" else "/", body)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"no error object: {content[:300]!r}"
    except AssertionError:
        return f"no API's shape: {content[:300]!r}"
    internals = _INTERNALS.search(error["message"])
    if internals is None or internals[0] in request:
        return None
    return f"leaks internals ({internals[0]!r}): {error['message'][:300]!r}"


def _is_failure(event: bytes) -> bool:
    return json.loads(event)["error"].get("type") in ("server_error", "api_error", "overloaded_error", "timeout_error")


def _shown(case: AnyCase) -> str:
    headers: object = cast(Any, case.headers)
    return f"{case.method} {case.formatted_path} query={case.query!r} headers={headers!r} body={case.body!r}"


def engines_of(url: str) -> dict[str, float]:
    """Gauges of the engines and the number of requests in flight."""
    names = ("rtap_engine_up", "rtap_engine_restarts_total", "rtap_in_flight")
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {f"{s.name} {s.labels.get('engine', '')}".strip(): s.value for s in samples if s.name in names}


def still_works(url: str, before: Mapping[str, float]) -> str | None:
    """The difference from the state before the fuzzing; None without one."""
    until = time.monotonic() + _GOOD_SECONDS
    reply = httpx.post(f"{url}/v1/chat/completions", json=GOOD, timeout=_GOOD_SECONDS)
    if reply.status_code != 200 or "degraded" in reply.json()["rtap"] or not reply.json()["rtap"]["cycles"]:
        return f"a good request is answered with {reply.status_code}: {reply.text[:300]}"
    if httpx.get(f"{url}/ready").status_code != 200:
        return "the server is not ready"
    while (now := engines_of(url)) != before:  # aborted requests are still ending
        if time.monotonic() > until:
            return f"the engines were {dict(before)} and are {now}"
        time.sleep(0.1)
    return None


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="fuzz.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--examples", type=int, default=25, help="examples of each operation and mode in a round")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--url", help="of a running server; default: start one with the bundled models")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "rtap-fuzz-server.log")
    options = parser.parse_args(argv)
    print(f"seed {options.seed}")
    if options.url:
        return _report(options.url, options)
    with running_server(serve_command(None, None, []), log=options.log, ready_seconds=300) as url:
        return _report(url, options)


def _report(url: str, options: argparse.Namespace) -> int:
    before = engines_of(url)
    report = fuzz(url, seconds=60 * options.minutes, examples=options.examples, seed=options.seed, log_line=print)
    for (operation, mode, status), count in sorted(report.replies.items()):
        print(f"{operation:45} {mode:10} {status:16} {count}")
    for finding in report.findings:
        print(f"\n{finding.operation} ({finding.mode})\n  {finding.problem}\n  {finding.request[:4000]}")
    broken = still_works(url, before)
    print(f"{report.requests} requests, {len(report.findings)} findings; {broken or 'a good request still passes'}")
    return 1 if report.findings or broken else 0


if __name__ == "__main__":
    sys.exit(main())
